"""Limits on connections: idle and slow ones are closed, and they cannot crowd out others."""

from __future__ import annotations

import asyncio
import resource
from asyncio import constants
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 10.0
"""Seconds in which a connection must send the headers of a request; wandb's clients send them at once."""
MAX_WAITING = 500
"""Connections that have not sent a whole header yet. Beyond that the oldest is closed, to keep room for active clients."""
MAX_OPEN_FILES = 65_536
"""Open files and connections of the process, where the system allows as many."""


class Connection(H11Protocol):
    """HTTP/1.1 with a time limit for the headers of a request."""

    waiting: dict[Connection, None] = {}  # noqa: RUF012
    """The connections that have not sent a whole header yet, oldest first."""
    _timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self._timeout is None and self._between_requests:
            self._wait()
        super().data_received(data)
        if not self._between_requests:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        self._timeout = self.loop.call_later(HEADERS_S, self._abort)
        self.waiting[self] = None
        if len(self.waiting) > MAX_WAITING:
            next(iter(self.waiting))._abort()

    def _stop_waiting(self) -> None:
        self.waiting.pop(self, None)
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None

    def _abort(self) -> None:
        self._stop_waiting()
        self.transport.abort()


def limit_handshakes() -> None:
    """Limit the time of TLS handshakes, which come before a ``Connection`` exists. uvicorn has no option for it."""
    setattr(constants, "SSL_HANDSHAKE_TIMEOUT", HEADERS_S)  # noqa: B010  (typed as final)


def raise_file_limit() -> int:
    """Raise the limit on open files as far as the system allows; returns how many connections that leaves room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < target:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    return max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200, 2 * MAX_WAITING)
