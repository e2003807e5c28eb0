"""Waiting for something that another process does."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any


def wait_for(
    condition: Callable[[], Any], what: str = "", explain: Callable[[], str] = lambda: "", timeout_s: float = 500
) -> Any:
    """The first true value of ``condition``.

    Args:
        condition: asked ten times a second.
        what: what is waited for, in words; else the source of ``condition``.
        explain: what to say besides when it takes too long.
        timeout_s: seconds until that.

    Raises AssertionError that says what was waited for and what ``condition`` gave last.
    """
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > end:
            raise AssertionError(
                f"waited {timeout_s:g} s for {what or source_of(condition)}; last it was {found!r}. {explain()}"
            )
        time.sleep(0.1)
    return found


def source_of(condition: Callable[[], Any]) -> str:
    """The code of ``condition``, to recognise it by."""
    try:
        return " ".join(inspect.getsource(condition).split())
    except (OSError, TypeError):
        return repr(condition)
