"""What a request must hold, wherever it comes in."""

from __future__ import annotations

import re

from isaerft_sweep.errors import IsaerftError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class RequestError(IsaerftError):
    """A request that cannot be answered; its text goes to the client. ``status``: HTTP's, where GraphQL has no say."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def disk_refused(error: BaseException | None) -> bool:
    """Whether the disk did not take what was to be written: nothing was acknowledged, and the client may try again."""
    return isinstance(error, OSError) or (isinstance(error, IsaerftError) and isinstance(error.__cause__, OSError))


def checked_name(what: str, name: str) -> str:
    """``name``, if it can name an entity, a project, a run or a sweep. Raises RequestError."""
    if not NAME.fullmatch(name):
        raise RequestError(
            f"a name of {what} must be of letters, digits, '_', '.' and '-', at most 128, and begin with a letter or digit, "
            f"but got {name[:140]!r}."
        )
    return name
