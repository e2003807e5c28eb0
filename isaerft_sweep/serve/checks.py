"""Checks that several parts of the server share."""

from __future__ import annotations

import errno
import json
import re
from typing import Any

from isaerft_sweep.errors import IsaerftError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EINVAL, errno.ELOOP)
"""Errors that no retry fixes: the file's name is too long, is that of a folder, or lies below another file."""


class RequestError(IsaerftError):
    """A request that cannot be answered. Its message goes to the client. ``status``: for HTTP, not used by GraphQL."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def disk_refused(error: BaseException | None) -> bool:
    """Whether a write to disk failed. Nothing was acknowledged then, and the client may retry."""
    if isinstance(error, OSError) and error.errno in NAME_ERRORS:
        return False
    return isinstance(error, OSError) or (isinstance(error, IsaerftError) and isinstance(error.__cause__, OSError))


def checked_name(kind: str, name: str) -> str:
    """``name``, if it is valid for an entity, project, run or sweep (``kind``). Raises RequestError."""
    if not NAME.fullmatch(name):
        raise RequestError(
            f"a name of {kind} must be of letters, digits, '_', '.' and '-', at most 128, and begin with a letter or digit, "
            f"but got {name[:140]!r}."
        )
    return name


def json_object(name: str, text: Any) -> dict[str, Any]:
    """Parse a JSON object. Raises RequestError, which mentions ``name``."""
    try:
        value = json.loads(text) if isinstance(text, str) else text or {}
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be a JSON object but got {str(text)[:80]}.")
    return value


def whole_number(name: str, value: Any) -> int | None:
    """A whole number of at least 0; None stays None. Raises RequestError, which mentions ``name``."""
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(f"{name} must be a whole number of at least 0 but got {str(value)[:80]}.")
    return value
