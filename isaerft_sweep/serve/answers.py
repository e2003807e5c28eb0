"""Responses: JSON that every client can parse, pages without active content, and one line for every error."""

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
INTERNAL_ERROR = "the server could not answer this; its log says why."
CLOSE = {"Connection": "close"}


class Json(JSONResponse):
    """JSON in ASCII: some clients read nothing else, and what clients sent need not be valid Unicode."""

    def render(self, content: Any) -> bytes:
        try:
            return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
        except ValueError:
            return json.dumps(as_json(content), separators=(",", ":"), allow_nan=False).encode()


def json_error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error response, readable by GraphQL clients and others."""
    return Json({"error": message, "errors": [{"message": message}]}, status, headers)


def html(text: str, status: int = 200) -> Response:
    """A page whose only active content is this server's own scripts."""
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src 'self' data: blob:; form-action 'self'; "
        "frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    return Response(text.encode("utf-8", "replace"), status, headers, "text/html")


def error_response(request: Request, error: Exception) -> Response:
    """The response to a request that failed: a page for browsers, JSON for others."""
    response = _json_response(request, error)
    if request.method != "GET" or "text/html" not in request.headers.get("Accept", "") or not response.body:
        return response
    message = html_escape(json.loads(bytes(response.body))["error"])
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<style>p {{ overflow-wrap: anywhere; }}</style><title>{message}</title>'
    page = f'<!doctype html><html lang="en"><head>{head}</head><body><p>{message}</p></body></html>'
    return html(page, response.status_code)


def _json_response(request: Request, error: Exception) -> Response:
    """One line. The traceback goes to the log, never to the client."""
    if isinstance(error, HTTPException):
        return json_error(error.status_code, error.detail, dict(error.headers or {}))
    if isinstance(error, RequestError):
        return json_error(error.status, str(error))
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)
    if disk_refused(error):
        # Nothing was acknowledged, so clients retry.
        log.error("the disk refused a write: %s", error)
        return json_error(507, f"the server's disk refused the write: {error}")
    if isinstance(error, OSError):
        return json_error(400, f"a file cannot have this name here: {error.strerror}.")
    if isinstance(error, IsaerftError):
        return json_error(400, str(error))
    log.error("%s %s failed: %r", request.method, request.scope["path"][:200], error, exc_info=error)
    # Clients retry after a 500. That is right for rows; a query would only fail again and again.
    return json_error(200 if request.scope["path"] == "/graphql" else 500, INTERNAL_ERROR)
