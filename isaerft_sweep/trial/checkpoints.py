"""Checkpoints of a trial: adapter, optimiser, schedule and random numbers, whole or not at all.

The files' names and contents are those of transformers' Trainer, so checkpoints of earlier versions resume too.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file

COMPLETE = ".complete"
"""Written into a checkpoint last: one without it was cut short by a crash and is ignored."""
KEPT = 2
RANDOM = "random.pt"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in ``folder``, oldest first."""
    whole = [mark.parent for mark in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(whole, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(checkpoint.name.split("-")[1])


def save_checkpoint(folder: Path, step: int, model: peft.PeftModel, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """Write ``checkpoint-STEP`` into ``folder``; only the latest ones are kept."""
    path = folder / f"checkpoint-{step}"
    shutil.rmtree(path, ignore_errors=True)  # one that a crash cut short
    path.mkdir(parents=True)
    # the embeddings are frozen; asked to look, PEFT would search the Hub for the base model's vocabulary
    model.save_pretrained(path, save_embedding_layers=False)
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    torch.save(schedule.state_dict(), path / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state(), "cuda": _cuda_state()}, path / RANDOM)
    (path / COMPLETE).touch()
    for old in complete_checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(path: Path, model: peft.PeftModel, optimizer: torch.optim.Optimizer, schedule: Any) -> int:
    """Put back what ``save_checkpoint`` wrote; the step that it was written after."""
    device = next(model.parameters()).device
    peft.set_peft_model_state_dict(model, load_file(path / "adapter_model.safetensors"))
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location=device, weights_only=True))
    schedule.load_state_dict(torch.load(path / "scheduler.pt", weights_only=True))
    if (path / RANDOM).is_file():  # an earlier version's has them in another form; only few models draw any
        state = torch.load(path / RANDOM, weights_only=True)
        torch.set_rng_state(state["cpu"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
    return step_of(path)


def _cuda_state() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
