"""The caller of a request, and W&B's formats of ids and times."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from isaerft_sweep.serve.checks import RequestError
from isaerft_sweep.serve.server import Server
from isaerft_sweep.serve.signing import Signer


@dataclass(frozen=True)
class Caller:
    """Who sent the request, and under which address it reached the server."""

    server: Server
    user: str
    base_url: str
    signer: Signer

    def file_url(self, path: str, method: str) -> str:
        """A signed URL of one file: wandb's uploads carry no key. It expires."""
        return f"{self.base_url}{quote(path)}?{self.signer.sign(method, path)}"


def stamp(seconds: float) -> str:
    """W&B's format of a time. ``seconds``: since the epoch."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def global_id(kind: str, *parts: str) -> str:
    """W&B's format of an id that is valid in all projects."""
    return base64.b64encode(":".join([kind, "v1", *parts]).encode()).decode()


def parse_id(kind: str, text: str) -> list[str]:
    """The parts of a ``global_id``. Raises RequestError when it is not an id of that kind."""
    try:
        parts = base64.b64decode(text, validate=True).decode().split(":")
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"'{text[:80]}' is not an id of this server.") from error
    if parts[:2] != [kind, "v1"]:
        raise RequestError(f"'{text[:80]}' is not the id of a {kind.lower()}.")
    return parts[2:]


def thinned(rows: Sequence[Any], samples: int) -> list[Any]:
    """At most ``samples`` rows, evenly spaced, including the last one."""
    samples = max(1, min(samples, 10_000_000))
    if len(rows) <= samples:
        return list(rows)
    return [rows[(i + 1) * len(rows) // samples - 1] for i in range(samples)]
