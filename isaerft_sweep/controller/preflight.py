"""What is checked before any trial is dispatched: the folder, the disk, and in a process of its own the trial's needs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from isaerft_sweep.errors import FolderError, LaunchError, ModelError
from isaerft_sweep.plain import canonical_json, to_dict
from isaerft_sweep.specs import Experiment


def check_disk(folder: Path, min_free_gb: float) -> None:
    """Raise FolderError unless the folder's disk has room."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        free_gb = shutil.disk_usage(existing).free / 1e9
    except OSError as error:
        raise FolderError(f"the output folder {folder} cannot be used: {error.strerror}.") from error
    if free_gb < min_free_gb:
        raise FolderError(
            f"the disk of {folder} must have {min_free_gb:g} GB free (launcher.min_free_gb) but has {free_gb:.2f} GB. "
            "Make room, or choose another disk: output=PATH."
        )


def check_trial_needs(experiment: Experiment) -> dict[str, Any]:
    """Model, SAEs and data, read as a trial will read them; facts about them. Raises ModelError when one is missing."""
    command = [sys.executable, "-m", "isaerft_sweep.trial.prepare"]
    done = subprocess.run(command, input=canonical_json(to_dict(experiment)), capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise LaunchError(
            f"the check of model, SAE and data ended with code {done.returncode}:\n{done.stderr.strip()[-2000:]}"
        ) from error
    if "error" in answer:
        raise ModelError(answer["error"])
    facts: dict[str, Any] = answer["ok"]
    return facts
