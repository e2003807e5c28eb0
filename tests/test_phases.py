"""What a trial says of itself before its first step, and that a request to stop is heard there at once."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, processes_of
from helpers.sweeps import ended_states, start, statuses
from helpers.trials import OFF, Made, rows_of
from helpers.waiting import wait_for

from isaerft_sweep.journal.atomic_files import _lock_of
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status_writer import StatusWriter
from isaerft_sweep.journal.worker_queue import Task, WorkerFolder
from isaerft_sweep.trial import process_cache, runner
from isaerft_sweep.trial.forward import activation_cache
from isaerft_sweep.trial.recorder import Recorder
from isaerft_sweep.trial.runner import run_trial
from isaerft_sweep.trial.worker import serve_trials

HEARD_S = 1.0


def slow(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, seconds: float = 30.0) -> None:
    """Stands in for a larger model: ``name`` takes long, and no processor time."""
    whole = getattr(place, name)

    def takes_long(*args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return whole(*args, **options)

    monkeypatch.setattr(place, name, takes_long)


def asked_during(phase: str, folder: TrialFolder, ask: Callable[[], None], work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` gives, and how long after ``ask``, which is called when the trial is in ``phase``, it gave it."""
    asked_s = [0.0]

    def wait_and_ask() -> None:
        while not folder.read_status().phase.startswith(phase):
            time.sleep(0.02)
        time.sleep(0.3)
        asked_s[0] = time.monotonic()
        ask()

    thread = threading.Thread(target=wait_and_ask)
    thread.start()
    found = work()
    took_s = time.monotonic() - asked_s[0]
    thread.join()
    return found, took_s


def told(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


SLOW_PLACES = {
    "loading the model": (runner, "load"),
    "loading the SAE": (runner, "attach_adapter"),
    "reading the data": (runner, "load_pairs"),
    "frozen layers": (activation_cache, "streams_of"),
    "evaluating": (Recorder, "evaluating"),
}


@pytest.mark.parametrize("phase", SLOW_PLACES)
@pytest.mark.parametrize("how", ["signal", "file"])
def test_a_stop_is_heard_within_a_second_before_the_first_step(
    phase: str, how: str, trial: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trial(*OFF, f"launcher.scratch={tmp_path / 'scratch'}", "orpo.eval_batch_size=1")
    place, name = SLOW_PLACES[phase]
    slow(monkeypatch, place, name, 0.4 if phase == "evaluating" else 30.0)
    ask = told(signal.SIGTERM) if how == "signal" else folder.ask_to_stop
    state, took_s = asked_during(phase, folder, ask, lambda: run_trial(folder, 1))
    assert state == TrialState.STOPPED == folder.read_status().state and took_s < HEARD_S, took_s
    assert "no step to keep" in folder.read_status().message
    monkeypatch.undo()
    whole = trial(*OFF, "launcher.activation_cache_gb=0", name="whole")
    folder.begin_attempt(2)
    assert run_trial(folder, 2) == run_trial(whole, 1) == "completed"
    assert [row["step"] for row in rows_of(folder)] == [row["step"] for row in rows_of(whole)]


def test_a_stop_is_heard_while_another_worker_computes_the_frozen_layers(trial: Made, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    first, waits = (trial(*OFF, f"launcher.scratch={scratch}", name=name) for name in "ab")
    assert run_trial(first, 1) == "completed"
    entry = next(path for path in scratch.iterdir() if path.is_dir())
    entry.rename(tmp_path / "aside")
    with _lock_of(entry).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        state, took_s = asked_during("frozen layers", waits, waits.ask_to_stop, lambda: run_trial(waits, 1))
    assert state == TrialState.STOPPED and took_s < HEARD_S


def test_a_request_for_an_early_stop_waits_for_a_checkpoint(trial: Made, tmp_path: Path) -> None:
    folder = trial(*OFF, f"launcher.scratch={tmp_path / 'scratch'}")
    folder.ask_to_stop(TrialState.PRUNED)
    assert run_trial(folder, 1) == TrialState.PRUNED
    assert list(folder.checkpoints.glob("checkpoint-1/.complete"))


def test_a_worker_that_ran_others_takes_the_blame(trial: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job's end must not count against a trial that had just sat down there."""
    first = trial(*OFF, name="first")
    other = trial(*OFF, "orpo.max_length=299", f"launcher.scratch={tmp_path / 'scratch'}", name="other")
    worker = WorkerFolder(tmp_path / "worker")
    worker.claim(Task(str(first.path), 1))
    worker.claim(Task(str(other.path), 1), room=None)
    compute = process_cache.stored_activations

    def slow_for_other(*args: Any) -> Any:
        if args[3].folder == tmp_path / "scratch":
            time.sleep(30)
        return compute(*args)

    monkeypatch.setattr(process_cache, "stored_activations", slow_for_other)
    _, took_s = asked_during("frozen", other, told(signal.SIGTERM), lambda: serve_trials(worker))
    assert took_s < 2 * HEARD_S and first.read_status().state == "completed"
    assert other.read_status().state == TrialState.STOPPED and other.read_status().begun is False


def test_a_long_evaluation_in_training_gets_half_the_grace(trial: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short one is finished, and its step kept; after a long one the trial goes on from the checkpoint before."""
    options = (
        *OFF,
        "orpo.eval_untrained=never",
        "orpo.eval_batch_size=1",
        "orpo.eval_fraction=0.5",
        "orpo.checkpoint_every_steps=1",
    )
    whole = trial(*options, name="whole")
    assert run_trial(whole, 1) == "completed"
    for grace, kept in ((60, 2), (1, 1)):
        folder = trial(*options, f"launcher.grace_s={grace}", name=f"grace{grace}")
        with monkeypatch.context() as patch:
            slow(patch, Recorder, "evaluating", 0.4)
            state, took_s = asked_during("evaluating", folder, folder.ask_to_stop, lambda f=folder: run_trial(f, 1))
        assert state == TrialState.STOPPED and took_s < 4
        assert max(int(path.parent.name.split("-")[1]) for path in folder.checkpoints.glob("*/.complete")) == kept
        folder.begin_attempt(2)
        assert run_trial(folder, 2) == "completed" and rows_of(folder) == rows_of(whole)


def test_the_phases_in_their_order(trial: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    write = StatusWriter.write

    def noted(self: StatusWriter, state: TrialState, *, force: bool = True, **changes: Any) -> None:
        write(self, state, force=force, **changes)
        said.append({"phase": self._status.phase, **changes})

    monkeypatch.setattr(StatusWriter, "write", noted)
    folder = trial(*OFF, f"launcher.scratch={tmp_path / 'scratch'}")
    before = time.time()
    assert run_trial(folder, 1) == "completed"
    words = [facts["phase"] for facts in said if facts["phase"]]
    bare = list(dict.fromkeys(word.rstrip("0123456789 %") for word in words))
    assert bare == [
        "loading the model", "loading the SAE", "reading the data", "frozen layers", "measuring the base model", "evaluating",
        "training", "measuring the latents", "saving",
    ]  # fmt: skip
    assert "frozen layers 100 %" in words and "evaluating 100 %" in words
    began = next(facts for facts in said if "trained_since" in facts)
    assert began["trained_from"] == 0 and before < began["trained_since"] < time.time()
    first_row = next(row for row in folder.read_metrics() if row["step"] == 1)
    assert began["trained_since"] <= first_row["time"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_whole_sweep_stops_while_the_frozen_layers_are_waited_for(number: signal.Signals, tmp_path: Path) -> None:
    scratch, sweep = tmp_path / "scratch", tmp_path / "outputs" / "s"
    options = (*TINY, *OFF, "sweep.run_cap=1", f"launcher.scratch={scratch}", "launcher.poll_s=5")
    first = start(tmp_path, *options, "name=first", "launcher.poll_s=0.2")
    assert first.wait(200) == 0
    entry = next(path for path in scratch.iterdir() if path.is_dir())
    entry.rename(tmp_path / "aside")
    with _lock_of(entry).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        controller = start(tmp_path, *options, "name=s")
        wait_for(lambda: [one for one in statuses(sweep) if one.get("phase", "").startswith("frozen")])
        asked_s = time.monotonic()
        controller.send_signal(number)
        assert controller.wait(60) == 130 and time.monotonic() - asked_s < 12, "two turns of 5 s, and no grace of 60 s"
    said = (tmp_path / "controller.out").read_text()
    assert "stopping, at most 60 s; Ctrl-C again ends it now" in said and "frozen layers" in said and "log.out" in said
    assert ended_states(sweep) == {"stopped": 1} and processes_of(tmp_path) == []
