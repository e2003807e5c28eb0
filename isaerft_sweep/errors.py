"""Errors that a user can cause. Each message says what must hold, what was given and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


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
