"""Files that survive a crash: written to a temporary file and renamed, or created once by the first process."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace the content of ``path`` atomically: a reader sees the old file or the new one."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Replace the content of ``path`` atomically by ``content`` as JSON."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any | None:
    """The JSON in ``path``; None when the file does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file without a torn last line; none when the file does not exist."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1] if line.strip()]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` (created if missing) during the block; the kernel frees it if the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def make_readable(folder: Path) -> None:
    """Let all users read the files in ``folder``: safetensors lets only the owner."""
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o644)


def create_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, filled by ``make`` if it does not exist yet.

    ``make`` fills a temporary folder, which is renamed, under a lock: safe in several processes at once, and in a crash.
    """
    if folder.is_dir():
        return folder
    with locked(_lock_of(folder)):
        if folder.is_dir():
            return folder
        for leftover in folder.parent.glob(f".{folder.name}.*/"):  # of a killed process: this one holds its lock
            shutil.rmtree(leftover, ignore_errors=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            make(aside)
            make_readable(aside)
            os.chmod(aside, 0o755)
            os.replace(aside, folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    return folder


def is_being_created(aside: Path) -> bool:
    """Whether a process in ``create_once`` still fills the temporary folder ``aside``; if not, it is a leftover."""
    try:
        with _lock_of(aside.with_name(aside.name[1:].rpartition(".")[0])).open("a", encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")
