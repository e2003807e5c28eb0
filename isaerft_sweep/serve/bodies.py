"""What comes in: bodies that are neither too large nor too slow, and what is in them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, NoReturn

from starlette.exceptions import HTTPException
from starlette.requests import Request

from isaerft_sweep.serve import runs as states
from isaerft_sweep.serve.checks import RequestError

MAX_BODY = 32 << 20
"""Of a GraphQL request or a piece of a stream, bytes; wandb sends at most 10 MiB at once."""
PATIENCE_S = 30.0
"""How long a body may take beyond what its bytes need at ``LEAST_RATE``."""
LEAST_RATE = 4 << 10
"""Bytes a second."""


async def limited(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body's chunks. Raises HTTPException as soon as there are more than ``limit`` bytes, or they come too slowly."""
    told = request.headers.get("Content-Length", "0")
    size = int(told) if told.isdecimal() and len(told) < 20 else 0
    if size > limit:
        raise _refused(413, f"a body may have at most {limit} bytes but this one has {size}.")
    size, loop, chunks = 0, asyncio.get_running_loop(), request.stream()
    begin = loop.time()
    while True:
        try:
            async with asyncio.timeout_at(begin + PATIENCE_S + size / LEAST_RATE):
                chunk = await anext(chunks, None)
        except TimeoutError as error:
            raise _refused(408, f"a body must come with at least {LEAST_RATE} bytes a second, but it stays out.") from error
        if chunk is None:
            return
        size += len(chunk)
        if size > limit:
            raise _refused(413, f"a body may have at most {limit} bytes but this one has more.")
        yield chunk


def _refused(status: int, words: str) -> HTTPException:
    """The connection ends with it: what is left of the body is not read."""
    return HTTPException(status, words, {"Connection": "close"})


async def json_body(request: Request) -> dict[str, Any]:
    """The JSON object in the body. Raises HTTPException, RequestError."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise _refused(415, "bodies must not be compressed.")
    content = b"".join([chunk async for chunk in limited(request, MAX_BODY)])
    try:
        body = json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body must be JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object.")
    return body


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON.")


def read_files(given: Any) -> dict[str, tuple[int, list[str]]]:
    """The pieces of the streams in a request: offset and lines by name. Raises RequestError."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RequestError("files must be an object.")
    found = {}
    for name, part in given.items():
        if name not in (*states.STREAMS, states.SUMMARY):
            continue
        rows = part.get("content") if isinstance(part, Mapping) else None
        offset = part.get("offset", 0) if isinstance(part, Mapping) else None
        if not isinstance(rows, list) or not all(isinstance(row, str) for row in rows):
            raise RequestError(f"{name} must have content, a list of lines.")
        if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
            raise RequestError(f"{name} must have an offset of at least 0 but got {offset!r}.")
        if name != states.OUTPUT:
            for row in rows:
                _check_row(name, row)
        found[name] = (offset, rows)
    return found


def _check_row(name: str, row: str) -> None:
    try:
        good = isinstance(json.loads(row), dict)
    except (ValueError, RecursionError):
        good = False
    if not good:
        raise RequestError(f"every line of {name} must be a JSON object but got {row[:80]!r}.")
