"""What a request must hold, wherever it comes in."""

from __future__ import annotations

import errno
import json
import re
from typing import Any

from isaerft_sweep.errors import IsaerftError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


NAME_ERRORS = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EINVAL, errno.ELOOP)
"""A file cannot be there under its name, today or tomorrow: too long, or a folder's, or below another file."""


class RequestError(IsaerftError):
    """A request that cannot be answered; its text goes to the client. ``status``: HTTP's, where GraphQL has no say."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def disk_refused(error: BaseException | None) -> bool:
    """Whether the disk did not take what was to be written: nothing was acknowledged, and the client may try again."""
    if isinstance(error, OSError) and error.errno in NAME_ERRORS:
        return False
    return isinstance(error, OSError) or (isinstance(error, IsaerftError) and isinstance(error.__cause__, OSError))


def checked_name(what: str, name: str) -> str:
    """``name``, if it can name an entity, a project, a run or a sweep. Raises RequestError."""
    if not NAME.fullmatch(name):
        raise RequestError(
            f"a name of {what} must be of letters, digits, '_', '.' and '-', at most 128, and begin with a letter or digit, "
            f"but got {name[:140]!r}."
        )
    return name


def json_object(name: str, text: Any) -> dict[str, Any]:
    """A JSON object in a string. Raises RequestError."""
    try:
        found = json.loads(text) if isinstance(text, str) else text or {}
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} must be JSON: {error}") from error
    if not isinstance(found, dict):
        raise RequestError(f"{name} must be a JSON object but got {str(text)[:80]}.")
    return found


def whole_number(name: str, value: Any) -> int | None:
    """A number that is not negative, None where there is none. Raises RequestError."""
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(f"{name} must be a whole number of at least 0 but got {str(value)[:80]}.")
    return value
