"""Trials in this process: their options, their rows, several in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.worker_queue import Task, WorkerFolder
from isaerft_sweep.trial.cobatch.multi_trial import MultiTrialModel
from isaerft_sweep.trial.runner import run_trial
from isaerft_sweep.trial.worker import serve_trials

Made = Callable[..., TrialFolder]
OFF = ("tracker=disabled",)


def rows_of(folder: TrialFolder) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in folder.read_metrics()]


LEVELS = {"whole": (0, False), "lean": (0, True), "stored": (1, True)}


def assert_near(found: TrialFolder, expected: TrialFolder, bound: float = 2e-4) -> None:
    """Every number of every step and evaluation, and the adapter, within ``bound`` (absolute and relative)."""
    rows = rows_of(found), rows_of(expected)
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for mine, alone in zip(*rows, strict=True):
        assert mine == pytest.approx(alone, rel=bound, abs=bound)
    weights = [load_file(folder.adapter / "adapter_model.safetensors") for folder in (found, expected)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=0.02 * 0.1, rtol=bound)  # of a learning rate of 0.1


def run_both_ways(
    trial: Made, options: Sequence[str], settings: Sequence[Sequence[str]], folder: WorkerFolder
) -> list[tuple[TrialFolder, TrialFolder]]:
    """Run trials one after the other, and the same ones in the passes of one worker: of each setting (alone, together)."""
    alone = [trial(*options, *own, name=f"alone{i}") for i, own in enumerate(settings)]
    together = [trial(*options, *own, name=f"together{i}") for i, own in enumerate(settings)]
    for one in alone:
        assert run_trial(one, 1) == "completed"
    sizes: list[int] = []
    assert run_together(folder, together, len(settings), sizes) == len(settings)
    assert len(settings) in sizes, "they went together"
    return list(zip(alone, together, strict=True))


def run_together(
    folder: WorkerFolder, trials: list[TrialFolder], trials_per_pass: int | None, sizes: list[int] | None = None
) -> int:
    """Run all ``trials`` in a worker in this process; ``sizes`` receives the number of trials of each pass."""
    for trial in trials:
        assert folder.claim(Task(str(trial.path), trial.current_attempt()), room=None)
    folder.claim(Task(None), room=None)
    with pytest.MonkeyPatch.context() as patch:
        forward = MultiTrialModel.forward

        def counted(self: MultiTrialModel, parts: Any) -> Any:
            if sizes is not None:
                sizes.append(len(parts))
            return forward(self, parts)

        patch.setattr(MultiTrialModel, "forward", counted)
        return serve_trials(folder, trials_per_pass=trials_per_pass)
