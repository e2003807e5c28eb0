"""Makes the embedded controller's sweep known to W&B, so that its runs have a sweep there: ``tracker=wandb``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from isaerft_sweep.specs import TrackerSpec

PATIENCE_S = 20
AGENT = re.compile(r"wandb agent \S+/([A-Za-z0-9_-]+)")
"""What ``wandb sweep`` ends with."""


def create_sweep(file: Path, tracker: TrackerSpec) -> str | None:
    """Create the sweep of a W&B sweep file with ``wandb sweep``; its id, None when W&B cannot be asked or does not take it.

    No agent will ask for its points: the controller samples.
    """
    said = _wandb_sweep(tracker, str(file))
    found = AGENT.search(said)
    if found is None:
        reason = next((line for line in said.splitlines() if "rror" in line or "No API key" in line), "no answer")
        print(f"W&B does not know this sweep ({reason[:200]}): it has an id of our own.", file=sys.stderr, flush=True)
    return found[1] if found else None


def finish_sweep(sweep_id: str, tracker: TrackerSpec) -> None:
    """Mark a sweep whose trials have ended with ``wandb sweep --stop``. W&B being away costs nothing but the mark."""
    _wandb_sweep(tracker, "--stop", sweep_id)


def _wandb_sweep(tracker: TrackerSpec, *arguments: str) -> str:
    """What the command prints; it never asks for a key."""
    where = ["--project", tracker.project, *(["--entity", tracker.entity] if tracker.entity else [])]
    command = [sys.executable, "-m", "wandb", "sweep", *where, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout + done.stderr
