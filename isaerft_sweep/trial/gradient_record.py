"""What a trial records of its training, so that trials at other settings can be emulated (``search/emulator.py``).

An adapter that adds a constant b @ W_dec shows the model a single vector v, and ORPO's loss is NLL + β · OR. So the
gradients of its two parts at each step's v say what the step would have been with another β or another learning rate.
"""

from __future__ import annotations

import os
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import peft
import torch

from isaerft_sweep.adapter.layer import IsaerftLayer
from isaerft_sweep.specs import Experiment

PARTS = 2
"""Of the loss: the NLL (with a router's loss), and the odds-ratio term for β = 1."""
MOST_BYTES = 2**30
"""Largest record."""


class GradientRecord:
    """The gradients of the loss's parts at every step, and the vector that the model saw.

    n: the adapter's numbers, of all hook points in a row; d: the residual stream's width times the hook points.
    """

    def __init__(self, model: peft.PeftModel, steps: int, path: Path) -> None:
        """``steps``: of the whole training. ``path``: the file that ``save`` writes."""
        self.model, self.path, self.steps = model, path, steps
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._gradients: list[np.ndarray] = []
        self._vectors: list[np.ndarray] = []
        self._projected: list[np.ndarray] = []
        self._sums: list[list[torch.Tensor]] = []

    def add_part(self, part: int) -> None:
        """Take the parameters' gradients as those of one part of a batch's loss, and clear them."""
        while len(self._sums) <= part:
            self._sums.append([torch.zeros_like(parameter) for parameter in self.trained])
        for total, parameter in zip(self._sums[part], self.trained, strict=True):
            assert parameter.grad is not None
            total += parameter.grad
            parameter.grad = None

    def finish_step(self, beta: float) -> None:
        """Record the step's gradients and the vector before it; set the gradients that the optimiser takes."""
        self._note_vector()
        self._gradients.append(np.stack([_row(part) for part in self._sums]))
        for parameter, *parts in zip(self.trained, *self._sums, strict=True):
            nll, odds_ratio = parts
            parameter.grad = nll + beta * odds_ratio
        self._sums = []

    def save(self, is_last: bool) -> None:
        """Write the record of the steps so far. ``is_last``: whether training has ended, which adds its final vector."""
        if is_last:
            self._note_vector()
        aside = self.path.with_suffix(".tmp")
        with aside.open("wb") as file:
            np.savez(
                file,
                gradients=np.array(self._gradients, dtype=np.float32),
                vectors=np.array(self._vectors, dtype=np.float32),
                projected=np.array(self._projected, dtype=np.float32),
            )
        os.replace(aside, self.path)

    def resume(self, step: int) -> bool:
        """Continue after ``step`` steps of an earlier attempt; whether its record reaches that far."""
        if step == 0:
            return True
        try:
            with np.load(self.path) as saved:
                rows = {name: list(saved[name][:step]) for name in ("gradients", "vectors", "projected")}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return False
        self._gradients, self._vectors, self._projected = rows["gradients"], rows["vectors"], rows["projected"]
        return len(self._gradients) == len(self._vectors) == step

    @torch.no_grad()
    def _note_vector(self) -> None:
        vectors, projected = [], []
        for module in self.model.modules():
            if isinstance(module, IsaerftLayer):
                for name in module.isaerft_block:
                    decoder = module.decoder(name)
                    vector = module.change(name, decoder[:1])  # a constant: of the stream only the device matters
                    projected.append(decoder @ vector)
                    vectors.append(vector)
        self._vectors.append(_row(vectors))
        self._projected.append(_row(projected))


def make_record(experiment: Experiment, model: peft.PeftModel, steps: int, path: Path) -> GradientRecord | None:
    """The record of a trial that others are emulated from; None without ``sweep.emulate``, or where it would be too large.

    Args:
        experiment: the trial's config.
        model: with its adapter.
        steps: of the whole training.
        path: the file to write.
    """
    if not experiment.sweep.emulate:
        return None
    numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if (PARTS + 1) * numbers * steps * 4 > MOST_BYTES:
        print(f"sweep.emulate: {steps} steps of {numbers} numbers are too many to record", flush=True)
        return None
    return GradientRecord(model, steps, path)


def _row(tensors: list[torch.Tensor]) -> np.ndarray:
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors]).cpu().numpy()
