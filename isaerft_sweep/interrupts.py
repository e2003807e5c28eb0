"""Ctrl-C while a command still imports packages: one line, as later. Imported first, so it imports almost nothing."""

from __future__ import annotations

import sys
from types import TracebackType


def end_with_one_line() -> None:
    """From now on a KeyboardInterrupt that nothing catches prints one line instead of a traceback."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("Stopped.", file=sys.stderr)
        else:
            previous(kind, error, trace)

    sys.excepthook = hook
