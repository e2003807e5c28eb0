"""Where the files that ship with the package are, from a checkout or from an installed wheel; and the cache."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """The shipped folder ``conf``, ``sweeps`` or ``slurm``: beside the package in a checkout, inside it in a wheel."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def asset(*parts: str) -> Path:
    """A file or folder of the package's own data."""
    return PACKAGE.joinpath("assets", *parts)


def cache_folder(given: str | None = None) -> Path:
    """Where converted models and made SAEs are kept: ``cache=…``, else $ISAERFT_CACHE, else the user's cache folder."""
    chosen = given or os.environ.get("ISAERFT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "isaerft-sweep"
