"""Signed URLs, which need no key: wandb uploads files without it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from pathlib import Path

from isaerft_sweep.serve.disk import write_secret

VALID_S = 24 * 3600
SECRET_BYTES = 32


class Signer:
    """Signs and checks URLs. The secret is stored in ``path``, so that URLs stay valid after a restart."""

    def __init__(self, path: Path) -> None:
        secret = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        if len(secret) < 2 * SECRET_BYTES:  # one that was written only in part could be guessed
            secret = secrets.token_hex(SECRET_BYTES)
            write_secret(path, secret)
        self._secret = secret.encode()

    def sign(self, method: str, path: str) -> str:
        """The query string of a signed URL for ``method`` on ``path``."""
        until = int(time.time()) + VALID_S
        return f"until={until}&signature={self._signature(method, path, until)}"

    def allows(self, method: str, path: str, until: str, signature: str) -> bool:
        """Whether the signature is valid and has not expired.

        Args:
            method: of the request.
            path: of its URL.
            until: seconds since the epoch, as in the URL.
            signature: from the URL.
        """
        if not until.isdecimal() or len(until) > 12 or int(until) < time.time():
            return False
        return hmac.compare_digest(self._signature(method, path, int(until)).encode(), signature.encode("utf-8", "replace"))

    def _signature(self, method: str, path: str, until: int) -> str:
        return hmac.new(self._secret, f"{method} {path} {until}".encode(), hashlib.sha256).hexdigest()
