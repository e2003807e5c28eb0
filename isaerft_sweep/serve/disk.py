"""The server's folder: for its own user alone, whoever has made it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from isaerft_sweep.errors import FolderError

OURS = ("server.jsonl", ".lock", "server.log", "keys.jsonl")


def made_folder(folder: Path) -> None:
    """Make the folder, or close it to others if it is the server's already. Raises FolderError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any((folder / name).exists() for name in OURS) or not any(folder.iterdir()):
            with suppress(PermissionError):  # another's, which lets us write: theirs to close
                folder.chmod(0o700)
    except OSError as error:
        raise FolderError(
            f"the data folder {folder} cannot be written ({error.strerror}). Choose another: --data PATH."
        ) from error


def write_secret(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``, which nobody else could read at any moment."""
    aside = path.with_name(f".{path.name}.new")
    aside.unlink(missing_ok=True)
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
