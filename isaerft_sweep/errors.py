"""Errors that a user can cause. Each message says what must hold, what was given and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from difflib import get_close_matches

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG)
FILE_ERRORS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR)
"""Errors that concern only the file that they name."""


class IsaerftError(Exception):
    """Base of every error that a user can cause; its text is all that is printed (no traceback)."""


class ConfigError(IsaerftError):
    """A value in the composed config is wrong."""


class SpaceError(IsaerftError):
    """A sweep file does not describe a valid search space."""


class DataError(IsaerftError):
    """The preference data cannot be used."""


class ModelError(IsaerftError):
    """The language model, its tokenizer or its SAE cannot be used."""


class FolderError(IsaerftError):
    """An output folder cannot be used: another sweep's, in use, or full."""


class JournalError(IsaerftError):
    """The sweep's journal cannot be read."""


class CardError(IsaerftError):
    """A model card cannot be written or read."""


class PushError(IsaerftError):
    """The Hub cannot be reached, or does not take an upload."""


class SyncError(IsaerftError):
    """Runs cannot be uploaded to a W&B server."""


class LaunchError(IsaerftError):
    """Trials cannot be dispatched."""


class TrialDiverged(IsaerftError):
    """A loss or metric is not finite, or the loss has exploded."""


def suggest(name: str, valid: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest valid one, then all of them."""
    names = sorted(valid)
    nearest = get_close_matches(name, names, n=1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    return f"{hint} Valid: {', '.join(names)}."


def disk_failure(error: BaseException, place: object, named_files: bool = True) -> str | None:
    """One line about a write that the disk refused, with what to do; None when the error has another cause.

    Args:
        error: PyTorch and safetensors hide the disk's own error, so its causes and its text are searched too.
        place: what could not be written, when the error names no file.
        named_files: whether a file that may not be used (permissions, its name) is a failure too.
    """
    if isinstance(error, OSError) and error.filename is not None and named_files and error.errno in FILE_ERRORS:
        return _refused(error.filename, error.strerror)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            return _refused(cause.filename or place, cause.strerror)
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    if "inline_container" in text and "Reader" not in text:  # torch.save: the C++ stream does not keep the reason
        return _refused(place, "PyTorch's writer failed: the disk is full, or it broke")
    reason = next((os.strerror(number) for number in DISK_ERRORS if os.strerror(number) in text), None)
    return _refused(place, reason) if reason else None


def _refused(path: object, reason: str | None) -> str:
    return (
        f"{path} cannot be written ({reason}). Make room or repair the disk, then run the same command again: nothing "
        "that has finished is lost."
    )
