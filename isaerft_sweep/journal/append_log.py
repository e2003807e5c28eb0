"""Append-only files of JSON lines: an append returns once the line is on the disk; a torn last line is cut off."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


class AppendLog:
    """One such file, open for appending by this process alone."""

    def __init__(self, path: Path, good_bytes: int) -> None:
        """``good_bytes``: the length of its complete lines, see ``whole_lines``; the file is cut to it."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, good_bytes)

    def append(self, *contents: Mapping[str, Any]) -> None:
        """Append the lines and flush them to disk. Raises OSError, with nothing appended, when that fails."""
        encoded = "".join(json.dumps(c, separators=(",", ":"), allow_nan=False) + "\n" for c in contents).encode()
        before = os.fstat(self._file).st_size
        try:
            if os.write(self._file, encoded) < len(encoded):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError:
            with suppress(OSError):  # a device that cannot be truncated
                os.ftruncate(self._file, before)
            raise

    def close(self) -> None:
        os.close(self._file)


def whole_lines(path: Path) -> tuple[list[bytes], int]:
    """The complete lines and their length in bytes; none when the file does not exist."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    end = content.rfind(b"\n") + 1
    return content[:end].split(b"\n")[:-1], end
