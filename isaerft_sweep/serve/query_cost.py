"""A limit on the cost of a query: the server has one thread, so agents' heartbeats wait while a query runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from isaerft_sweep.serve.checks import RequestError

LIMIT = 200_000
"""Units per query, of a few µs each: about a second."""
FIELD, ROW = 4, 1
"""Units for each field in the response, and for each row in it."""
PER_VALUE = 12
"""Additional units for each value in the variables, up to twice the limit: requests for many files at once need them."""
CHECKS_PER_UNIT, READS_PER_UNIT = 2, 8
"""How many runs a filter checks, and how many rows of a history are read, for one unit."""

_left: ContextVar[int | None] = ContextVar("left", default=None)


class TooCostly(BaseException):
    """Ends a query at once. An Exception would make only one of its fields null, and the others would still be computed."""


@contextmanager
def limited(values: int = 0) -> Iterator[None]:
    """Enforce the limit within the block. Raises RequestError above it. ``values``: how many the query's variables have."""
    token = _left.set(LIMIT + min(PER_VALUE * values, 2 * LIMIT))
    try:
        yield
    except TooCostly as error:
        raise RequestError(
            "this query asks for too much at once: it would keep agents waiting. Request fewer runs (first, after), fewer "
            "rows (samples, minStep and maxStep) or leave out lists within lists."
        ) from error
    finally:
        _left.reset(token)


def spend(units: int) -> None:
    """Count units against the query's limit; outside a query, do nothing."""
    left = _left.get()
    if left is None:
        return
    if units > left:
        raise TooCostly
    _left.set(left - units)


def spend_reading(rows: int) -> None:
    """Count the reading of a history of ``rows`` rows. A single one never exceeds the limit."""
    spend(min(rows // READS_PER_UNIT, LIMIT // 10))
