"""New folders that are there whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.atomic_files import make_readable


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` when the block ends well and vanishes when it does not.

    Raises FolderError when ``target`` holds anything already or cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FolderError(f"the folder {target} must be empty or not there yet. Choose another: --out DIR.")
    aside: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        yield aside
        make_readable(aside)
        aside.chmod(0o755)
        aside.replace(target)
    except OSError as error:
        raise FolderError(f"{target} cannot be written ({error.strerror or error}). Choose another: --out DIR.") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
