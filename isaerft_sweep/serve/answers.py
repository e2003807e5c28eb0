"""What goes out: JSON that every client can read, pages that run nothing, and one clear line for whatever fails."""

from __future__ import annotations

import json
import logging
from html import escape as html_escape
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from isaerft_sweep.errors import IsaerftError
from isaerft_sweep.serve.checks import RequestError, disk_refused
from isaerft_sweep.tracking.metric_names import as_json

log = logging.getLogger("isaerft.serve")
UNFORESEEN = "the server could not answer this; its log says why."
CLOSE = {"Connection": "close"}


class Json(JSONResponse):
    """JSON in ASCII: some clients read nothing else, and what was sent here need not be valid Unicode."""

    def render(self, content: Any) -> bytes:
        try:
            return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
        except ValueError:
            return json.dumps(as_json(content), separators=(",", ":"), allow_nan=False).encode()


def refusal(status: int, words: str, headers: dict[str, str] | None = None) -> Response:
    """An error, in the form of GraphQL too."""
    return Json({"error": words, "errors": [{"message": words}]}, status, headers)


def html(text: str, status: int = 200) -> Response:
    """A page that can do nothing but be looked at."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    return Response(text.encode("utf-8", "replace"), status, headers, "text/html")


def failed(request: Request, error: Exception) -> Response:
    """The answer to a request that has failed: for a browser a page, for others JSON."""
    answer = _refused(request, error)
    if request.method != "GET" or "text/html" not in request.headers.get("Accept", "") or not answer.body:
        return answer
    words = html_escape(json.loads(bytes(answer.body))["error"])
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<style>p {{ overflow-wrap: anywhere; }}</style><title>{words}</title>'
    return html(f'<!doctype html><html lang="en"><head>{head}</head><body><p>{words}</p></body></html>', answer.status_code)


def _refused(request: Request, error: Exception) -> Response:
    """One clear line. The trace goes to the log, never to the client."""
    if isinstance(error, HTTPException):
        return refusal(error.status_code, error.detail, dict(error.headers or {}))
    if isinstance(error, RequestError):
        return refusal(error.status, str(error))
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)
    if disk_refused(error):
        # acknowledged is only what is on the disk; clients try again
        log.error("the disk does not take it: %s", error)
        return refusal(507, f"the server's disk does not take it: {error}")
    if isinstance(error, OSError):
        return refusal(400, f"a file cannot have this name here: {error.strerror}.")
    if isinstance(error, IsaerftError):
        return refusal(400, str(error))
    log.error("%s %s failed: %r", request.method, request.scope["path"][:200], error, exc_info=error)
    # clients send again what is answered with 500, which is right for rows; a query would only fail again and again
    return refusal(200 if request.scope["path"] == "/graphql" else 500, UNFORESEEN)
