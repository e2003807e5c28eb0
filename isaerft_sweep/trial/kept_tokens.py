"""Tokenised pairs on the disk, so that the check and every worker of a node need not tokenise the same."""

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
"""Data sets that are kept; the least recently used goes first. A process that reads one keeps its files until it ends."""


@dataclass(frozen=True)
class Tokenised:
    """Data sets by split, how many pairs were left out by reason, and how many are cut at ``max_length``."""

    sets: dict[str, Dataset]
    left_out: dict[str, int]
    truncated: int


def kept_tokens(folder: Path, key: str | None, make: Callable[[], Tokenised]) -> Tokenised:
    """What is kept under ``key`` in ``folder``, or what ``make`` gives, which is kept then. A disk that does not take it
    costs only the time; ``key`` None: not kept."""
    if key is None:
        return make()
    made: list[Tokenised] = []

    def write(aside: Path) -> None:
        made.append(make())
        for name, data in made[0].sets.items():
            data.save_to_disk(aside / name)
        facts = {"left_out": made[0].left_out, "truncated": made[0].truncated, "splits": list(made[0].sets)}
        write_json(aside / "facts.json", facts)

    with suppress(OSError):
        entry = create_once(folder / key, write)
        with suppress(OSError):
            os.utime(entry)
        _make_room(folder)
        found = made[0] if made else _read(entry)
        if found is not None:
            return found
        shutil.rmtree(entry, ignore_errors=True)
    return made[0] if made else make()


def _read(entry: Path) -> Tokenised | None:
    """An entry; None when it is not what was written."""
    try:
        facts: Any = read_json(entry / "facts.json")
        sets = {name: Dataset.load_from_disk(str(entry / name)) for name in facts["splits"]}
        return Tokenised(sets, facts["left_out"], facts["truncated"])
    except Exception:  # Arrow and datasets each raise their own
        return None


def _make_room(folder: Path) -> None:
    entries = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for old in sorted(entries, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
