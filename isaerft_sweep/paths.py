"""Paths of the files that ship with the package, in a checkout or an installed wheel, and of the cache."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
WANDB = "wandb:"
"""What a sweep's place begins with when it is in W&B: ``wandb:ENTITY/PROJECT/ID``."""


def folder(name: str) -> Path:
    """The shipped folder ``conf``, ``sweeps`` or ``slurm``: beside the package in a checkout, inside it in a wheel."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def asset(*parts: str) -> Path:
    """A file or folder in the package's assets."""
    return PACKAGE.joinpath("assets", *parts)


def cache_folder(configured: str | None = None) -> Path:
    """The folder of converted models and made SAEs: ``cache=…``, else $ISAERFT_CACHE, else the user's cache folder."""
    chosen = configured or os.environ.get("ISAERFT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "isaerft-sweep"


def quoted(path: Path | str) -> str:
    """The path as a shell takes it, for commands that are printed."""
    return shlex.quote(str(path))
