"""Request bodies: limits on size and speed, and parsing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, NoReturn

from starlette.exceptions import HTTPException
from starlette.requests import Request

from isaerft_sweep.serve.checks import RequestError
from isaerft_sweep.serve.runs import OUTPUT, STREAMS, SUMMARY

MAX_BODY = 32 << 20
"""Bytes of a GraphQL request or a stream request; wandb sends at most 10 MiB at once."""
GRACE_S = 30.0
"""How many seconds longer a body may take than its bytes need at ``MIN_RATE``."""
MIN_RATE = 4 << 10
"""Bytes per second."""


async def read_limited(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body's chunks. Raises HTTPException as soon as there are more than ``limit`` bytes, or they come too slowly."""
    header = request.headers.get("Content-Length", "0")
    size = int(header) if header.isdecimal() and len(header) < 20 else 0
    if size > limit:
        raise _refused(413, f"a body may have at most {limit} bytes but this one has {size}.")
    size, loop, chunks = 0, asyncio.get_running_loop(), request.stream()
    start = loop.time()
    while True:
        try:
            async with asyncio.timeout_at(start + GRACE_S + size / MIN_RATE):
                chunk = await anext(chunks, None)
        except TimeoutError as error:
            raise _refused(408, f"a body must arrive with at least {MIN_RATE} bytes a second, but it is slower.") from error
        if chunk is None:
            return
        size += len(chunk)
        if size > limit:
            raise _refused(413, f"a body may have at most {limit} bytes but this one has more.")
        yield chunk


def _refused(status: int, message: str) -> HTTPException:
    """An error that closes the connection, since the rest of the body is not read."""
    return HTTPException(status, message, {"Connection": "close"})


async def json_body(request: Request) -> dict[str, Any]:
    """The JSON object in the body. Raises HTTPException, RequestError."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise _refused(415, "bodies must not be compressed.")
    content = b"".join([chunk async for chunk in read_limited(request, MAX_BODY)])
    try:
        body = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body must be JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object.")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number.")


def parse_files(content: Any) -> dict[str, tuple[int, list[str]]]:
    """The parts of streams in a request: offset and lines, by stream. Raises RequestError."""
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise RequestError("files must be an object.")
    files = {}
    for name, part in content.items():
        if name not in (*STREAMS, SUMMARY):
            continue
        rows = part.get("content") if isinstance(part, Mapping) else None
        offset = part.get("offset", 0) if isinstance(part, Mapping) else None
        if not isinstance(rows, list) or not all(isinstance(row, str) for row in rows):
            raise RequestError(f"{name} must have content, a list of lines.")
        if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
            raise RequestError(f"{name} must have an offset of at least 0 but got {offset!r}.")
        if name != OUTPUT:
            for row in rows:
                _check_row(name, row)
        files[name] = (offset, rows)
    return files


def _check_row(name: str, row: str) -> None:
    try:
        valid = isinstance(json.loads(row), dict)
    except (ValueError, RecursionError):
        valid = False
    if not valid:
        raise RequestError(f"every line of {name} must be a JSON object but got {row[:80]!r}.")
