"""HTTP: routes, authentication and file transfer."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from isaerft_sweep.paths import asset
from isaerft_sweep.serve import graphql, pages
from isaerft_sweep.serve.answers import CLOSE, Json, error_response, html, json_error
from isaerft_sweep.serve.bodies import json_body, parse_files, read_limited
from isaerft_sweep.serve.caller import Caller
from isaerft_sweep.serve.checks import RequestError
from isaerft_sweep.serve.keys import KeyRing
from isaerft_sweep.serve.runs import ServedRun
from isaerft_sweep.serve.server import Server
from isaerft_sweep.serve.signing import Signer
from isaerft_sweep.serve.sweep_report import can_draw
from isaerft_sweep.serve.sweeps import ServedSweep

log = logging.getLogger("isaerft.serve")
WATCH_S = 1.0
MAX_FORM = 4096
"""Bytes of a page's form."""
CHALLENGE = {"WWW-Authenticate": 'Basic realm="isaerft-sweep serve: any name, the key as password", charset="UTF-8"'}
Handler = Callable[[Request], Awaitable[Response]]


class Anything(PathConvertor):
    """A path with any characters that file names may have, including line ends."""

    regex = r"[\s\S]*"


register_url_convertor("anything", Anything())


class Application:
    """The routes of one server. ``max_upload``: largest uploaded file, in bytes."""

    def __init__(self, server: Server, keys: KeyRing, signer: Signer, max_upload: int) -> None:
        self.server, self.keys, self.signer, self.max_upload = server, keys, signer, max_upload
        self._drawing = asyncio.Lock()

    def asgi(self) -> Starlette:
        """The application that uvicorn runs."""
        stream = "/files/{entity}/{project}/{run}/file_stream"
        routes = [
            Route("/graphql", self._guarded(self.graphql), methods=["POST"]),
            Route(stream, self._guarded(self.stream), methods=["POST"]),
            Route("/uploads/{path:anything}", self._with_errors(self.upload), methods=["PUT"]),
            Route("/uploads/{path:anything}", self._with_errors(self.download), methods=["GET"]),
            Route("/artifactsV2/{path:anything}", self._guarded(self.artifact_file), methods=["GET"]),
            Route("/healthz", self._with_errors(self.health), methods=["GET"]),
            Route("/", self._guarded(self.overview), methods=["GET"]),
            Route("/static/{name}", self._guarded(self.script), methods=["GET"]),
            Route("/{entity}/{project}/sweeps/{sweep}/state", self._guarded(self.set_state), methods=["POST"]),
            Route("/{entity}/{project}/sweeps/{sweep}", self._guarded(self.sweep), methods=["GET"]),
            Route("/{entity}/{project}/runs/{run}/stop", self._guarded(self.stop_run), methods=["POST"]),
            Route("/{entity}/{project}/runs/{run}/files/{path:anything}", self._guarded(self.run_file), methods=["GET"]),
            Route("/{entity}/{project}/runs/{run}", self._guarded(self.run), methods=["GET"]),
            Route("/{entity}/{project}", self._guarded(self.project), methods=["GET"]),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _not_routed})

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
                self.server.registry.watch()
            except Exception:  # the server must keep running; the next turn tries again
                log.exception("looking for crashed runs failed")

    # -- authentication and errors

    def _with_errors(self, handler: Handler) -> Handler:
        """Turn every exception of a handler into a response, so that no request can stop the server."""

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except Exception as error:
                return error_response(request, error)

        return handle

    def _guarded(self, handler: Callable[[Request, Caller], Awaitable[Response]]) -> Handler:
        async def guarded(request: Request) -> Response:
            user = self.keys.user_of(_key_of(request))
            if user is None:
                message = "a valid key is needed: WANDB_API_KEY, or as password"
                return json_error(401, message, {**CHALLENGE, **CLOSE})
            caller = Caller(self.server, user, str(request.base_url).rstrip("/"), self.signer)
            if request.headers.get("Origin", caller.base_url) != caller.base_url:
                return json_error(403, "cross-origin request refused")
            return await handler(request, caller)

        return self._with_errors(guarded)

    # -- W&B's protocol

    async def graphql(self, request: Request, caller: Caller) -> Response:
        body = await json_body(request)
        query, variables = body.get("query"), body.get("variables")
        variables = {} if variables is None else variables
        operation = body.get("operationName")
        if not isinstance(query, str) or not isinstance(variables, dict) or not isinstance(operation, (str, type(None))):
            raise RequestError("a GraphQL request must have a query, and variables as an object.")
        return Json(graphql.execute(caller, query, variables, operation or None))

    async def stream(self, request: Request, caller: Caller) -> Response:
        body = await json_body(request)
        params = request.path_params
        run = self.server.find_run(params["entity"], params["project"], params["run"])
        stopped = self.server.stream(run, parse_files(body.get("files")), body)
        return Json({"limits": {}, **({"stopped": True} if stopped else {})})

    # -- files

    def _signed_path(self, request: Request) -> Path:
        """The file that a signed URL names. Raises HTTPException."""
        path = unquote(request.scope["raw_path"].decode("ascii"))  # file names may contain %, ? and #
        params = request.query_params
        method = "PUT" if request.method == "PUT" else "GET"
        if not self.signer.allows(method, path, params.get("until", ""), params.get("signature", "")):
            raise HTTPException(403, "this address is not valid or has expired.", CLOSE)
        parts = PurePosixPath(path.removeprefix("/uploads/")).parts
        min_parts = {"runs": 5, "artifacts": 3}.get(parts[0] if parts else "", 99)
        if len(parts) < min_parts or any(part == ".." or "\0" in part for part in parts):
            raise HTTPException(400, "a file's name must be a relative path without '..'.")
        return self.server.folder.joinpath(*parts)

    async def upload(self, request: Request) -> Response:
        await self._receive(request, self._signed_path(request))
        return Response(status_code=200)

    async def _receive(self, request: Request, target: Path) -> None:
        """Write the body to a temporary file, then move it to ``target``. Raises HTTPException, OSError."""
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.server.staging)
        try:
            with os.fdopen(handle, "wb") as file:
                async for chunk in read_limited(request, self.max_upload):
                    file.write(chunk)
                file.flush()
                await run_in_threadpool(os.fsync, file.fileno())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    async def download(self, request: Request) -> Response:
        return _attachment(self._signed_path(request))

    async def artifact_file(self, request: Request, caller: Caller) -> Response:
        """A file of an artifact by its digest, for clients without a signed URL: …/BIRTH-ID/MD5/NAME."""
        parts = request.path_params["path"].split("/")
        try:
            artifact_id, digest = parts[-3], base64.b64encode(bytes.fromhex(parts[-2])).decode()
        except (IndexError, ValueError) as error:
            raise HTTPException(404, "there is no such file.") from error
        return _attachment(self.server.artifacts.by_digest(artifact_id, digest))

    # -- pages

    async def health(self, request: Request) -> Response:
        return Response("ok", headers=CLOSE)

    async def overview(self, request: Request, caller: Caller) -> Response:
        return html(pages.overview(caller))

    async def project(self, request: Request, caller: Caller) -> Response:
        params = request.path_params
        return html(pages.project(caller, caller.server.project(params["entity"], params["project"])))

    async def sweep(self, request: Request, caller: Caller) -> Response:
        served = self._sweep_of(request, caller)
        if not can_draw():
            return html(pages.sweep(caller, served))
        async with self._drawing:  # one page at a time: figures take much of a processor
            return html(await run_in_threadpool(pages.sweep_report(caller, served)))

    async def set_state(self, request: Request, caller: Caller) -> Response:
        """A button of a sweep's page."""
        served = self._sweep_of(request, caller)
        body = b"".join([chunk async for chunk in read_limited(request, MAX_FORM)])
        state = parse_qs(body.decode("utf-8", "replace")).get("state", [""])[0]
        if state not in [allowed for _, allowed, _ in pages.sweep_forms(served)]:
            raise RequestError(f"the sweep is {served.state} and cannot become '{state[:20]}'.", 409)
        self.server.update_sweep(served, None, state, {})
        return _back(request, "/state")

    async def run(self, request: Request, caller: Caller) -> Response:
        return html(pages.run(caller, self._run_of(request, caller)))

    async def stop_run(self, request: Request, caller: Caller) -> Response:
        """The button of a run's page."""
        self.server.stop_run(self._run_of(request, caller))
        return _back(request, "/stop")

    async def run_file(self, request: Request, caller: Caller) -> Response:
        """A file of a run; images are shown, all others are saved."""
        folder = self.server.files_of(self._run_of(request, caller))
        parts = PurePosixPath(request.path_params["path"]).parts
        if any(part in ("..", "/") or "\0" in part for part in parts):
            raise HTTPException(400, "a file's name must be a relative path without '..'.")
        path = folder.joinpath(*parts)
        media_type = pages.IMAGES.get(path.suffix.lower())
        if media_type is None or not path.is_file():
            return _attachment(path)
        headers = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'"}
        return FileResponse(path, media_type=media_type, headers=headers)

    async def script(self, request: Request, caller: Caller) -> Response:
        """Plotly, or the script that draws a page's figures with it."""
        name = request.path_params["name"]
        if name not in pages.STATIC or (name == "plotly.js" and not can_draw()):
            raise HTTPException(404, "there is no such file.")
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"}
        return Response(await run_in_threadpool(_script, name), headers=headers, media_type="text/javascript")

    def _sweep_of(self, request: Request, caller: Caller) -> ServedSweep:
        params = request.path_params
        return caller.server.find_sweep(params["entity"], params["project"], params["sweep"])

    def _run_of(self, request: Request, caller: Caller) -> ServedRun:
        params = request.path_params
        return caller.server.find_run(params["entity"], params["project"], params["run"])


def _script(name: str) -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()) if name == "plotly.js" else asset(name).read_text(encoding="utf-8")


def _back(request: Request, suffix: str) -> Response:
    """Send the browser back to the page whose button was pressed."""
    return Response(status_code=303, headers={"Location": request.url.path.removesuffix(suffix)})


def _attachment(path: Path | None) -> Response:
    if path is None or not path.is_file():
        raise HTTPException(404, "there is no such file.")
    # Never displayed inline: the file may be HTML with scripts.
    headers = {"Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff"}
    return FileResponse(path, media_type="application/octet-stream", headers=headers)


def _key_of(request: Request) -> str:
    kind, _, content = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return content.strip()
    try:
        return base64.b64decode(content, validate=True).decode().partition(":")[2] if kind.lower() == "basic" else ""
    except (binascii.Error, ValueError):
        return ""


async def _not_routed(request: Request, error: Exception) -> Response:
    return error_response(request, error)
