"""Trials that advance together: the numbers of trials alone, each with its own end, and none harmed by another's."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, processes_of
from helpers.sweeps import check_wandb_runs, ended_states, start, stepping
from helpers.trials import Made, assert_near, rows_of, run_both_ways, run_together
from helpers.waiting import wait_for

from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.adapter.layer import IsaerftLayer
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.worker_queue import Task, TaskProgress, WorkerFolder
from isaerft_sweep.trial import worker
from isaerft_sweep.trial.cobatch import multi_trial
from isaerft_sweep.trial.cobatch.multi_trial import MultiTrialModel
from isaerft_sweep.trial.runner import run_trial
from isaerft_sweep.trial.worker import serve_trials

OFF = ("tracker=disabled", "orpo.learning_rate=0.1")
FAMILIES = ["llama", "gemma2", "gemma3_text", "qwen2", "qwen3", "gpt_neox"]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "cache_gb"), [*((family, 1) for family in FAMILIES), ("llama", 0), ("gemma2", 0)])
def test_co_batched_trials_have_the_numbers_of_trials_alone(family: str, cache_gb: int, trial: Made, tmp_path: Path) -> None:
    shared = (*OFF, f"model.architecture={family}", f"launcher.activation_cache_gb={cache_gb}", "orpo.eval_fraction=0.5")
    settings = [
        ("orpo.beta=2.0",),
        ("orpo.beta=0.1", "orpo.seed=7", "orpo.gradient_accumulation=2"),
        ("adapter=scale", "orpo.eval_fraction=1", "orpo.batch_size=2"),
        ("adapter=mlp", "adapter.hidden_size=8", "orpo.max_steps=2", "orpo.eval_untrained=always"),
    ]
    for expected, mine in run_both_ways(trial, shared, settings, WorkerFolder(tmp_path / "worker")):
        assert_near(mine, expected)


@pytest.mark.slow
def test_a_single_trial_has_the_same_bits_with_room_for_more(trial: Made, tmp_path: Path) -> None:
    alone, single = (trial(*OFF, "adapter=mlp", "adapter.hidden_size=8", name=name) for name in ("alone", "single"))
    assert run_trial(alone, 1) == "completed"
    assert run_together(WorkerFolder(tmp_path / "worker"), [single], 3) == 1
    assert rows_of(single) == rows_of(alone)
    weights = [(t.adapter / "adapter_model.safetensors").read_bytes() for t in (alone, single)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_trials_join_and_leave_between_steps(trial: Made, tmp_path: Path) -> None:
    short, long, late = (
        trial(*OFF, f"orpo.max_steps={steps}", name=name) for name, steps in (("short", 2), ("long", 30), ("late", 3))
    )
    alone = [trial(*OFF, f"orpo.max_steps={steps}", name=f"alone{steps}") for steps in (2, 30, 3)]
    folder = WorkerFolder(tmp_path / "worker")
    first = [folder.claim(Task(str(t.path), 1), room=2) for t in (short, long)]
    assert first == [1, 2] and folder.claim(Task(str(late.path), 1), room=2) is None, "no room yet"

    def controller() -> None:
        wait_for(lambda: folder.progress().over(1))
        assert not folder.progress().over(2) and folder.claim(Task(str(late.path), 1), room=2) == 3
        wait_for(lambda: folder.progress().over(3))
        assert not folder.progress().over(2), "it came later and left earlier"
        wait_for(lambda: folder.progress().over(2))
        folder.claim(Task(None))

    thread = threading.Thread(target=controller)
    thread.start()
    assert serve_trials(folder, trials_per_pass=2) == 3
    thread.join()
    for mine, expected in zip((short, long, late), alone, strict=True):
        assert run_trial(expected, 1) == "completed"
        assert_near(mine, expected, 2e-3)
    assert folder.progress() == TaskProgress(3, ending=True)


@pytest.mark.slow
def test_what_becomes_of_one_trial_leaves_the_others_alone(trial: Made, tmp_path: Path) -> None:
    settings = OFF
    fine, alone = trial(*settings, name="fine"), trial(*settings, name="alone")
    assert run_trial(alone, 1) == "completed"
    pruned = trial(*settings, "orpo.beta=0.5", name="pruned")
    pruned.ask_to_stop(TrialState.PRUNED)
    diverging = trial(*settings, "orpo.learning_rate=1.0e+3", "orpo.diverged_loss_factor=1.001", name="diverging")
    other_data = trial(*settings, "data.eval_size=4", name="other")
    checkpointing = trial(*settings, "orpo.gradient_checkpointing=true", name="checkpointing")
    trials = [pruned, fine, diverging, other_data, checkpointing]
    sizes: list[int] = []
    assert run_together(WorkerFolder(tmp_path / "worker"), trials, 3, sizes) == 5
    states = [t.read_status().state for t in trials]
    assert states == ["pruned", "completed", "diverged", "completed", "completed"]
    assert max(sizes) == 3, "those with other data, or a pass of their own kind, came afterwards"
    assert_near(fine, alone)
    pruned.begin_attempt(2)
    assert run_trial(pruned, 2) == "completed", "it resumes from its checkpoint, alone"
    expected = trial(*settings, "orpo.beta=0.5", name="expected")
    assert run_trial(expected, 1) == "completed"
    assert_near(pruned, expected)


class Broken(torch.autograd.Function):
    """Passes its input on, and fails on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("this adapter is broken")


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_error_in_a_pass_belongs_to_one_trial(
    direction: str, trial: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulating = (*OFF, "orpo.gradient_accumulation=2")  # the error finds gradients of an earlier pass
    good, bad, never = (
        trial(*accumulating, f"orpo.beta={beta}", name=name) for name, beta in (("a", 1.0), ("b", 2.0), ("c", 3.0))
    )
    alone = trial(*accumulating, "orpo.beta=1.0", name="alone")
    assert run_trial(alone, 1) == "completed"
    original = IsaerftLayer.changed

    def changed(self: IsaerftLayer, x: torch.Tensor) -> torch.Tensor:
        if not getattr(self, "broken", False):
            return original(self, x)
        if direction == "forward":
            raise RuntimeError("this adapter is broken")
        return Broken.apply(original(self, x)) if torch.is_grad_enabled() else original(self, x)

    passes = [0]
    make = worker._Worker._joint_model

    def breaking(self: Any, running: Any) -> Any:
        passes[0] += 1
        if passes[0] > 2 and len(self.trials) == 2 and self.trials[2].wants_forward and self.trials[2].trains:
            decoder_layers(self.trials[2].forward.model)[self._hook_layer].broken = True
        return make(self, running)

    monkeypatch.setattr(IsaerftLayer, "changed", changed)
    monkeypatch.setattr(worker._Worker, "_joint_model", breaking)
    folder = WorkerFolder(tmp_path / "worker")
    assert run_together(folder, [good, bad, never], 2) == 2
    assert good.read_status().state == "completed"
    assert_near(good, alone)
    assert bad.read_status().state == "failed" and "this adapter is broken" in bad.read_status().message
    assert never.read_status().state == "stopped", "handed back: the worker ends after an error"
    assert folder.progress() == TaskProgress(3, ending=True)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["log", "status"])
def test_a_trial_that_cannot_write_leaves_co_batched_trials_alone(
    what: str, trial: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fine, broken = trial(*OFF, name="fine"), trial(*OFF, name="broken")
    (broken.log if what == "log" else broken.status).mkdir()
    folder = WorkerFolder(tmp_path / "worker")
    assert run_together(folder, [fine, broken], 2) == 2
    assert fine.read_status().state == "completed"
    if what == "log":
        assert "log.out cannot be written (Is a directory)" in broken.read_status().message
    else:
        assert "cannot be written (Is a directory)" in capfd.readouterr().err and list(broken.status.iterdir()) == []
    assert folder.progress() == TaskProgress(2, ending=True)


@pytest.mark.slow
def test_a_pass_that_does_not_fit_into_memory_runs_in_halves(
    trial: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = MultiTrialModel.forward

    def small(self: MultiTrialModel, parts: Any) -> Any:
        if len(parts) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (a stand-in: there is no GPU here)")
        return forward(self, parts)

    monkeypatch.setattr(MultiTrialModel, "forward", small)
    trials = [trial(*OFF, f"orpo.beta={i + 1}.0", name=f"t{i}") for i in range(3)]
    assert run_together(WorkerFolder(tmp_path / "worker"), trials, 3) == 3
    assert {t.read_status().state for t in trials} == {"completed"}


@pytest.mark.slow
def test_the_number_of_trials_per_pass_is_measured(
    trial: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The times are made up; that they are taken, and nothing but them is changed by it, is not."""
    times = {1: 1.0, 2: 1.2, 4: 1.9, 8: 3.7}
    tried: list[int] = []
    step = multi_trial._step_seconds

    def timed(model: MultiTrialModel, parts: list[Any]) -> float:
        tried.append(len(parts))
        step(model, parts)
        return times[len(parts)]

    monkeypatch.setattr(multi_trial, "_step_seconds", timed)
    folder = WorkerFolder(tmp_path / "worker")
    trials = [trial(*OFF, "orpo.gradient_accumulation=2", f"orpo.beta={i + 1}.0", name=f"t{i}") for i in range(4)]
    alone = trial(*OFF, "orpo.gradient_accumulation=2", "orpo.beta=1.0", name="alone")
    assert run_trial(alone, 1) == "completed"
    sizes: list[int] = []
    assert run_together(folder, trials, None, sizes) == 4
    assert folder.room() == 4 and sorted(set(tried)) == [1, 2, 4, 8], "8 take 0.46 s each, 4 took 0.48"
    assert "trials per pass: 4 (measured" in capfd.readouterr().out
    assert sizes.count(4) > 4, "and so many go together"
    assert_near(trials[0], alone)


@pytest.mark.slow
@pytest.mark.long
def test_a_co_batched_sweep_and_a_crash_in_it(tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    options = (
        *TINY,
        "name=s",
        "sweep.run_cap=4",
        "launcher.trials_per_pass=2",
        "orpo.max_steps=30",
        "orpo.checkpoint_every_steps=5",
    )
    controller = start(tmp_path, *options)
    both = wait_for(lambda: found if len(found := [s for s in stepping(sweep) if s["step"] > 10]) == 2 else None)
    assert both[0]["pid"] == both[1]["pid"], "two trials in one process"
    os.kill(both[0]["pid"], signal.SIGKILL)
    assert controller.wait(240) == 0, (tmp_path / "controller.out").read_text()
    assert ended_states(sweep) == {"completed": 4, "failed": 2}
    assert processes_of(tmp_path) == []
    for folder in sweep.glob("trials/*"):
        steps = [row["step"] for row in rows_of(TrialFolder(folder)) if "train/loss" in row]
        assert steps == list(range(1, 31)), "every step once"
    check_wandb_runs(sweep, trials=4, last_step=30)
