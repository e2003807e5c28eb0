"""Requests to a process that loads torch, which this one never does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from isaerft_sweep.errors import ModelError
from isaerft_sweep.guard import of_process


def request(module: str, content: Mapping[str, Any], purpose: str) -> Any:
    """What ``python -m module`` answers to ``content`` in the last line of its output, ``{"ok": …}`` or ``{"error": …}``.

    ``purpose``: what the process does, for the error. Raises ModelError when it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", module], input=json.dumps(content), capture_output=True, text=True, check=False
    )
    try:
        reply = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise ModelError(f"the process that {purpose} {of_process(done)}") from error
    if "error" in reply:
        raise ModelError(reply["error"])
    return reply["ok"]
