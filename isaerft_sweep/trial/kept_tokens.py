"""Disk cache of tokenised pairs, shared by the check and every worker of a node."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from isaerft_sweep.journal.atomic_files import create_once, read_json, write_json

KEPT = 4
"""Cached data sets; the least recently used is deleted first. A process that reads one keeps its files open."""


@dataclass(frozen=True)
class Tokenised:
    """Data sets by split, and the numbers of pairs left out, by reason, and of pairs cut at ``max_length``."""

    sets: dict[str, Dataset]
    left_out: dict[str, int]
    truncated: int


def kept_tokens(folder: Path, key: str | None, make: Callable[[], Tokenised]) -> Tokenised:
    """The entry ``key`` of the cache in ``folder``; if missing, ``make()``, which is then cached.

    A folder that cannot be written only costs time. ``key`` None: no caching.
    """
    if key is None:
        return make()
    made: list[Tokenised] = []

    def write(aside: Path) -> None:
        made.append(make())
        for name, data in made[0].sets.items():
            if len(data):  # datasets cannot read an empty one again
                data.save_to_disk(aside / name)
        metadata = {"left_out": made[0].left_out, "truncated": made[0].truncated, "splits": list(made[0].sets)}
        write_json(aside / "facts.json", metadata)

    with suppress(OSError):
        entry = create_once(folder / key, write)
        with suppress(OSError):
            os.utime(entry)
        _make_room(folder)
        tokenised = made[0] if made else _read(entry)
        if tokenised is not None:
            return tokenised
        shutil.rmtree(entry, ignore_errors=True)
    return made[0] if made else make()


def _read(entry: Path) -> Tokenised | None:
    """An entry; None when it is missing or damaged."""
    try:
        metadata: Any = read_json(entry / "facts.json")
        stored = {n: Dataset.load_from_disk(str(entry / n)) for n in metadata["splits"] if (entry / n).is_dir()}
        nothing = next(iter(stored.values())).select([])
        return Tokenised(
            {n: stored.get(n, nothing) for n in metadata["splits"]}, metadata["left_out"], metadata["truncated"]
        )
    except Exception:  # Arrow and datasets raise different types
        return None


def _make_room(folder: Path) -> None:
    entries = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for old in sorted(entries, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
