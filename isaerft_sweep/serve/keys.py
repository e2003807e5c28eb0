"""Access keys: random, shown once, kept as hashes.

A key has 40 letters and digits, 238 bits of chance. That is why a plain SHA-256 is enough at rest: slow hashes protect what
people can think of, and this one is looked up for every request.
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
"""What every version of wandb takes for a key."""
ALPHABET = string.ascii_letters + string.digits


class KeyRing:
    """The keys in ``path``, by user. Several processes may read it; one at a time adds to it."""

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
        """A new key for ``user``. Nobody can read it again later."""
        key = "".join(secrets.choice(ALPHABET) for _ in range(LENGTH))
        self._write({"user": user, "sha256": _digest(key), "created": f"{time.time():.0f}"})
        return key

    def revoke(self, user: str) -> None:
        """Make all of the user's keys invalid."""
        self._write({"user": user, "revoked": "yes"})

    def user_of(self, key: str) -> str | None:
        """Whose key that is; None when it is nobody's."""
        return self._users.get(_digest(key))

    def _write(self, event: dict[str, str]) -> None:
        os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600))
        self.path.chmod(0o600)  # one of an older version
        log = AppendLog(self.path, self._length)
        try:
            log.append(event)
        finally:
            log.close()
        self._length = self.path.stat().st_size
        self._apply(event)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
