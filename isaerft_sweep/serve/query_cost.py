"""What one query may cost: the server has one thread, and agents' heartbeats wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from isaerft_sweep.serve.checks import RequestError

LIMIT = 200_000
"""Units that a query may use up, a few µs each: about a second."""
FIELD, ROW = 4, 1
"""Of a field that is answered, of a row that is sent."""
PER_VALUE = 12
"""Units more for every value that is sent along, up to twice the limit: many files at once are answered one by one."""
LOOKS, READ_ROWS = 2, 8
"""Runs that are looked at for a filter, and rows of a history that are read, for one unit."""

_left: ContextVar[int | None] = ContextVar("left", default=None)


class TooCostly(BaseException):
    """Ends a query at once: an Exception would only make one of its fields null, and the others would go on."""


@contextmanager
def limited(values: int = 0) -> Iterator[None]:
    """Within it ``spend`` counts. Raises RequestError when the query asks for too much. ``values``: how many it brings."""
    token = _left.set(LIMIT + min(PER_VALUE * values, 2 * LIMIT))
    try:
        yield
    except TooCostly as error:
        raise RequestError(
            "this query asks for too much at once: it would keep agents waiting. Ask for fewer runs (first, after), fewer "
            "rows (samples, minStep and maxStep) or leave out lists within lists."
        ) from error
    finally:
        _left.reset(token)


def spend(units: int) -> None:
    """Use up a part of what the query may cost; outside of one nothing is counted."""
    left = _left.get()
    if left is None:
        return
    if units > left:
        raise TooCostly
    _left.set(left - units)


def spend_reading(rows: int) -> None:
    """A history is read. One alone is never too much."""
    spend(min(rows // READ_ROWS, LIMIT // 10))
