"""Access keys: random, shown once, kept as hashes.

A key has 40 random letters and digits, 238 bits of entropy. That is why a plain SHA-256 is enough: slow hashes protect
passwords that people choose, and this hash is computed for every request.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import string
import time
from pathlib import Path

from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.append_log import AppendLog, whole_lines

LENGTH = 40
"""Every version of wandb accepts keys of this length."""
ALPHABET = string.ascii_letters + string.digits


class KeyRing:
    """The keys in ``path``, with their users. Several processes may read the file; only one at a time may write it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._users: dict[str, str] = {}
        lines, self._length = whole_lines(path)
        try:
            for line in lines:
                self._apply(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise FolderError(f"{path} must hold keys' hashes but has a broken line ({error}). Restore it.") from error

    def _apply(self, event: dict[str, str]) -> None:
        if event.get("revoked"):
            self._users = {digest: user for digest, user in self._users.items() if user != event["user"]}
        else:
            self._users[event["sha256"]] = event["user"]

    @property
    def users(self) -> set[str]:
        return set(self._users.values())

    def add(self, user: str) -> str:
        """Create a key for ``user``. It cannot be read again later."""
        key = "".join(secrets.choice(ALPHABET) for _ in range(LENGTH))
        self._write({"user": user, "sha256": _digest(key), "created": f"{time.time():.0f}"})
        return key

    def revoke(self, user: str) -> None:
        """Make all keys of the user invalid."""
        self._write({"user": user, "revoked": "yes"})

    def user_of(self, key: str) -> str | None:
        """The user whose key that is; None when the key is not valid."""
        return self._users.get(_digest(key))

    def _write(self, event: dict[str, str]) -> None:
        os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600))
        self.path.chmod(0o600)  # an older version created it with other permissions
        log = AppendLog(self.path, self._length)
        try:
            log.append(event)
        finally:
            log.close()
        self._length = self.path.stat().st_size
        self._apply(event)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
