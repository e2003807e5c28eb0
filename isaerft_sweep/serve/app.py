"""HTTP: who may ask, how much may be sent, and which part of the server answers."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from isaerft_sweep.errors import IsaerftError
from isaerft_sweep.serve import graphql, page
from isaerft_sweep.serve import runs as states
from isaerft_sweep.serve.caller import Caller
from isaerft_sweep.serve.checks import RequestError, disk_refused
from isaerft_sweep.serve.keys import KeyRing
from isaerft_sweep.serve.server import Server
from isaerft_sweep.serve.signing import Signer

log = logging.getLogger("isaerft.serve")
MAX_BODY = 32 << 20
"""Of a GraphQL request or a piece of a stream, bytes; wandb sends at most 10 MiB at once."""
WATCH_S = 1.0
CHALLENGE = {"WWW-Authenticate": 'Basic realm="isaerft-sweep serve: any name, the key as password", charset="UTF-8"'}


class Application:
    """The routes over one server. ``max_upload``: of an uploaded file, bytes."""

    def __init__(self, server: Server, keys: KeyRing, signer: Signer, max_upload: int) -> None:
        self.server, self.keys, self.signer, self.max_upload = server, keys, signer, max_upload

    def asgi(self) -> Starlette:
        """The application that uvicorn runs."""
        stream = "/files/{entity}/{project}/{run}/file_stream"
        routes = [
            Route("/graphql", self._guarded(self.graphql), methods=["POST"]),
            Route(stream, self._guarded(self.stream), methods=["POST"]),
            Route("/uploads/{path:path}", self.upload, methods=["PUT"]),
            Route("/uploads/{path:path}", self.download, methods=["GET"]),
            Route("/healthz", self.health, methods=["GET"]),
            Route("/", self._guarded(self.overview), methods=["GET"]),
            Route("/{entity}/{project}/sweeps/{sweep}", self._guarded(self.sweep), methods=["GET"]),
            Route("/{entity}/{project}/runs/{run}", self._guarded(self.run), methods=["GET"]),
            Route("/{entity}/{project}", self._guarded(self.project), methods=["GET"]),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _http_error})

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            self.server.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                self.server.fleet.watch()
            except Exception:  # the server must go on; what failed is tried again
                log.exception("looking for crashed runs failed")

    # -- who may ask

    def _guarded(
        self, handler: Callable[[Request, Caller], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            user = self.keys.user_of(_key_of(request))
            if user is None:
                return JSONResponse({"error": "a valid key is needed: WANDB_API_KEY, or as password"}, 401, CHALLENGE)
            caller = Caller(self.server, user, str(request.base_url).rstrip("/"), self.signer)
            if request.headers.get("Origin", caller.base_url) != caller.base_url:
                return JSONResponse({"error": "another site's page may not ask in a browser's name"}, 403)
            try:
                return await handler(request, caller)
            except RequestError as error:
                return JSONResponse({"error": str(error), "errors": [{"message": str(error)}]}, error.status)
            except (IsaerftError, OSError) as error:
                if not disk_refused(error):
                    return JSONResponse({"error": str(error), "errors": [{"message": str(error)}]}, 400)
                # acknowledged is only what is on the disk; clients try again
                log.error("the disk does not take it: %s", error)
                return JSONResponse({"error": f"the server's disk does not take it: {error}"}, 507)
            except ClientDisconnect:
                return Response(status_code=400)

        return guarded

    # -- W&B's protocol

    async def graphql(self, request: Request, caller: Caller) -> Response:
        body = await _json_body(request)
        query, variables = body.get("query"), body.get("variables")
        variables = {} if variables is None else variables
        operation = body.get("operationName")
        if not isinstance(query, str) or not isinstance(variables, dict) or not isinstance(operation, (str, type(None))):
            raise RequestError("a GraphQL request must have a query, and variables as an object.")
        return JSONResponse(graphql.answer(caller, query, variables, operation or None))

    async def stream(self, request: Request, caller: Caller) -> Response:
        body = await _json_body(request)
        place = request.path_params
        run = self.server.find_run(place["entity"], place["project"], place["run"])
        stopped = self.server.stream(run, read_files(body.get("files")), body)
        return JSONResponse({"limits": {}, **({"stopped": True} if stopped else {})})

    # -- files

    def _place(self, request: Request) -> Path:
        """The file that a signed address names. Raises HTTPException."""
        path = request.url.path
        given = request.query_params
        method = "PUT" if request.method == "PUT" else "GET"
        if not self.signer.allows(method, path, given.get("until", ""), given.get("signature", "")):
            raise HTTPException(403, "this address is not valid, or not any more.")
        parts = PurePosixPath(request.path_params["path"]).parts
        least = {"runs": 5, "artifacts": 3}.get(parts[0] if parts else "", 99)
        if len(parts) < least or any(part == ".." or part.startswith(".upload") or "\0" in part for part in parts):
            raise HTTPException(400, "a file's name must be a relative path without '..'.")
        return self.server.folder.joinpath(*parts)

    async def upload(self, request: Request) -> Response:
        try:
            await self._receive(request, self._place(request))
        except OSError as error:
            raise HTTPException(507, f"the server's disk does not take it: {error.strerror}") from error
        return Response(status_code=200)

    async def _receive(self, request: Request, target: Path) -> None:
        """Write the body beside ``target``, then put it in its place whole. Raises HTTPException, OSError."""
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=target.parent, prefix=".upload.")
        try:
            with os.fdopen(handle, "wb") as file:
                async for chunk in _limited(request, self.max_upload):
                    file.write(chunk)
                file.flush()
                await run_in_threadpool(os.fsync, file.fileno())
            os.replace(aside, target)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise

    async def download(self, request: Request) -> Response:
        target = self._place(request)
        if not target.is_file():
            raise HTTPException(404, "there is no such file.")
        # never shown in this server's name: it may be anybody's HTML
        headers = {"Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff"}
        return FileResponse(target, media_type="application/octet-stream", headers=headers)

    # -- for people

    async def health(self, request: Request) -> Response:
        return Response("ok")

    async def overview(self, request: Request, caller: Caller) -> Response:
        return _html(page.overview(caller))

    async def project(self, request: Request, caller: Caller) -> Response:
        place = request.path_params
        return _html(page.project(caller, caller.server.project(place["entity"], place["project"])))

    async def sweep(self, request: Request, caller: Caller) -> Response:
        place = request.path_params
        return _html(page.sweep(caller, caller.server.find_sweep(place["entity"], place["project"], place["sweep"])))

    async def run(self, request: Request, caller: Caller) -> Response:
        place = request.path_params
        return _html(page.run(caller, caller.server.find_run(place["entity"], place["project"], place["run"])))


def _key_of(request: Request) -> str:
    kind, _, content = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return content.strip()
    try:
        return base64.b64decode(content, validate=True).decode().partition(":")[2] if kind.lower() == "basic" else ""
    except (binascii.Error, ValueError):
        return ""


async def _limited(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body's chunks. Raises HTTPException 413 as soon as there are more than ``limit`` bytes."""
    told = request.headers.get("Content-Length", "0")
    size = int(told) if told.isdecimal() and len(told) < 20 else 0
    if size > limit:
        raise HTTPException(413, f"a body may have at most {limit} bytes but this one has {size}.")
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise HTTPException(413, f"a body may have at most {limit} bytes but this one has more.")
        yield chunk


async def _json_body(request: Request) -> dict[str, Any]:
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise HTTPException(415, "bodies must not be compressed.")
    content = b"".join([chunk async for chunk in _limited(request, MAX_BODY)])
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body must be JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object.")
    return body


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


def _html(text: str) -> Response:
    policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)
