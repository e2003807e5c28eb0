"""Creates folders atomically: complete, or not at all."""

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
    """A temporary folder to fill. It becomes ``target`` when the block succeeds, and is deleted when it raises.

    Raises FolderError when ``target`` is not empty or cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FolderError(f"the folder {target} must be empty or not there yet. Choose another: --out DIR.")
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        yield staging
        make_readable(staging)
        staging.chmod(0o755)
        staging.replace(target)
    except OSError as error:
        raise FolderError(f"{target} cannot be written ({error.strerror or error}). Choose another: --out DIR.") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
