"""The server's data folder, which only its own user can access."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from isaerft_sweep.errors import FolderError

SERVER_FILES = ("server.jsonl", ".lock", "server.log", "keys.jsonl")


def prepare_folder(folder: Path) -> None:
    """Create the folder; one that is empty or a server's already is closed to other users. Raises FolderError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any((folder / name).exists() for name in SERVER_FILES) or not any(folder.iterdir()):
            with suppress(PermissionError):  # it belongs to another user
                folder.chmod(0o700)
    except OSError as error:
        raise FolderError(
            f"the data folder {folder} cannot be written ({error.strerror}). Choose another: --data PATH."
        ) from error


def write_secret(path: Path, text: str) -> None:
    """Replace the file; at no moment can another user read it."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
