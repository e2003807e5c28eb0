"""What produced a result: versions, machine, git commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "isaerft-sweep", "torch", "transformers", "trl", "datasets", "tokenizers", "peft", "sae-lens", "wandb", "hydra-core",
    "omegaconf", "submitit", "optuna",
)  # fmt: skip


def describe_environment(**more: Any) -> dict[str, Any]:
    """Versions of Python and the packages, the machine, and ``more``."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "processors": os.cpu_count(),
        "command": sys.argv,
        "git_commit": git_commit(),
        "packages": versions(),
        **more,
    }


def versions() -> dict[str, str]:
    """Versions of those ``PACKAGES`` that are installed."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def git_commit(folder: Path | None = None) -> str | None:
    """The commit of the working tree (``+changes`` when it has any), or None outside of one."""
    checkout = folder or Path(__file__).resolve().parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=checkout, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "--untracked-files=no") else commit
