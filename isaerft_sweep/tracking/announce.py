"""Registers the embedded controller's sweep in W&B, so that its runs belong to a sweep there (``tracker=wandb``)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from isaerft_sweep.specs import TrackerSpec

TIMEOUT_S = 20
AGENT = re.compile(r"wandb agent \S+/([A-Za-z0-9_-]+)")
"""The last line that ``wandb sweep`` prints."""


def create_sweep(file: Path, tracker: TrackerSpec) -> str | None:
    """Create the sweep of a W&B sweep file with ``wandb sweep``; returns its id, None when W&B is unreachable or refuses.

    No agent requests points from it: the controller samples.
    """
    output = _wandb_sweep(tracker, str(file))
    match = AGENT.search(output)
    if match is None:
        reason = next((line for line in output.splitlines() if "rror" in line or "No API key" in line), "no answer")
        print(f"W&B does not have this sweep ({reason[:200]}): its id is a local one.", file=sys.stderr, flush=True)
    return match[1] if match else None


def finish_sweep(sweep_id: str, tracker: TrackerSpec) -> None:
    """Mark a sweep as finished with ``wandb sweep --stop``. Without W&B only the mark is missing."""
    _wandb_sweep(tracker, "--stop", sweep_id)


def _wandb_sweep(tracker: TrackerSpec, *arguments: str) -> str:
    """Run ``wandb sweep`` without a prompt for a key; returns its output, empty after a timeout."""
    options = ["--project", tracker.project, *(["--entity", tracker.entity] if tracker.entity else [])]
    command = [sys.executable, "-m", "wandb", "sweep", *options, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout + done.stderr
