"""Checkpoints of a trial: adapter, optimiser, schedule and random state; incomplete ones are ignored.

File names and contents are those of transformers' Trainer, so checkpoints of earlier versions resume too.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file

from isaerft_sweep.trial.random_state import RandomState

COMPLETE = ".complete"
"""Written into a checkpoint last: a checkpoint without it was interrupted by a crash."""
KEPT = 2
RANDOM = "random.pt"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, oldest first."""
    complete = [mark.parent for mark in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(complete, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def save_checkpoint(folder: Path, step: int, model: peft.PeftModel, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """Write ``checkpoint-STEP`` into ``folder`` and delete all but the latest ``KEPT`` checkpoints.

    Args:
        folder: of the trial's checkpoints.
        step: the last finished step.
        model: with the trained adapter.
        optimizer: of the adapter's parameters.
        schedule: of the learning rate.
    """
    path = folder / f"checkpoint-{step}"
    shutil.rmtree(path, ignore_errors=True)  # left by a crash
    path.mkdir(parents=True)
    # the embeddings are frozen; with the default, PEFT would look up the base model's vocabulary on the Hub
    model.save_pretrained(path, save_embedding_layers=False)
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    torch.save(schedule.state_dict(), path / "scheduler.pt")
    torch.save(vars(RandomState.now()), path / RANDOM)
    (path / COMPLETE).touch()
    for old in complete_checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(path: Path, model: peft.PeftModel, optimizer: torch.optim.Optimizer, schedule: Any) -> int:
    """Restore what ``save_checkpoint`` wrote and return its step.

    Args:
        path: the checkpoint's folder.
        model: receives the adapter's weights.
        optimizer: receives its state.
        schedule: likewise.
    """
    device = next(model.parameters()).device
    peft.set_peft_model_state_dict(model, load_file(path / "adapter_model.safetensors"))
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location=device, weights_only=True))
    schedule.load_state_dict(torch.load(path / "scheduler.pt", weights_only=True))
    if (path / RANDOM).is_file():  # earlier versions have another format; few models draw random numbers
        RandomState(**torch.load(path / RANDOM, weights_only=True)).restore()
    return step_of(path)
