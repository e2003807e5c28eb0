"""A copy of this package's code: a queued job runs the code that its controller was started with."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from isaerft_sweep.journal.atomic_files import create_once
from isaerft_sweep.paths import PACKAGE


def code_snapshot(folder: Path) -> Path:
    """A folder inside ``folder`` to put first in PYTHONPATH; the same code is copied once."""
    files = sorted(path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(PACKAGE)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())

    def copy(aside: Path) -> None:
        shutil.copytree(PACKAGE, aside / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))

    folder.mkdir(parents=True, exist_ok=True)
    return create_once(folder / digest.hexdigest()[:16], copy)
