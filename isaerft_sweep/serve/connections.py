"""Connections that say nothing, or too slowly, are closed; those that wait to say something cannot crowd out others."""

from __future__ import annotations

import asyncio
import resource
from asyncio import constants
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 10.0
"""How long a connection may take for a request's first lines; wandb's clients send them at once."""
MOST_WAITING = 500
"""Connections without a whole request: beyond that the oldest is closed, so that whoever speaks is always heard."""
FILES = 65_536
"""Open files and connections that the process may have, where the system allows it."""


class Connection(H11Protocol):
    """HTTP, with a limit on how long a request's first lines may take. A request that is refused ends its connection."""

    waiting: dict[Connection, None] = {}  # noqa: RUF012
    """Those that have not said anything whole yet, the oldest first."""
    _too_slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self._too_slow is None and self._between_requests:
            self._wait()
        super().data_received(data)
        if not self._between_requests:
            self._heard()

    def connection_lost(self, exc: Exception | None) -> None:
        self._heard()
        super().connection_lost(exc)

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        self._too_slow = self.loop.call_later(HEADERS_S, self._end)
        self.waiting[self] = None
        if len(self.waiting) > MOST_WAITING:
            next(iter(self.waiting))._end()

    def _heard(self) -> None:
        self.waiting.pop(self, None)
        if self._too_slow is not None:
            self._too_slow.cancel()
            self._too_slow = None

    def _end(self) -> None:
        self._heard()
        self.transport.abort()


def limit_handshakes() -> None:
    """Of https, whose greeting comes before a ``Connection`` is there: uvicorn has no option for how long it may take."""
    setattr(constants, "SSL_HANDSHAKE_TIMEOUT", HEADERS_S)  # noqa: B010  (typed as final)


def allow_many() -> int:
    """Raise the limit on open files as far as the system allows it; how many connections that leaves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200, 2 * MOST_WAITING)
