"""What a person sees while a sweep runs."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from isaerft_sweep.controller.live_view import SHOWN_ROWS, LiveView, time_left_s, trial_left_s
from isaerft_sweep.journal.job_refs import LocalJob, SlurmJob
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import TrialStatus
from isaerft_sweep.search.sampler import Point


def record(index: int, state: str, **facts: Any) -> TrialRecord:
    point = Point({"orpo.learning_rate": 0.001 * (index + 1), "orpo.beta": 0.1})
    return TrialRecord(index, f"run-{index}", f"r{index}", point, state=TrialState(state), **facts)


def drawn(records: list[TrialRecord], statuses: dict[int, TrialStatus]) -> str:
    """The live table, as a terminal gets it."""
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=120, height=60, color_system=None)
    with LiveView(console, "eval/log_odds_chosen", 50) as view:
        view.update(records, statuses)
    return terminal.getvalue()


def test_the_table_tells_state_point_step_loss_metric_and_time_left() -> None:
    started = time.time() - 100
    running = TrialStatus(1, TrialState.RUNNING, step=10, max_steps=40, loss=1.25, metric=0.5, started=started)
    text = drawn([record(0, "completed", metric=0.75, seconds=60.0), record(1, "queued")], {1: running})
    heads = ("#", "state", "lr", "beta", "step", "loss", "log odds", "time left")
    assert all(head in text for head in heads), text
    row = next(line for line in text.splitlines() if "running" in line)
    assert row.split() == ["2", "running", "2.0e-03", "0.1", "10/40", "1.2500", "0.5000", "5", "min"], row
    assert "1 of 50 trials ended" in text and "left" in text


def test_what_is_under_way_is_always_shown() -> None:
    """A revived trial, or an early one that takes long, among many later ones."""
    records = [record(i, "queued" if i in (0, 3) else "completed", metric=0.1) for i in range(60)]
    text = drawn(records, dict.fromkeys((0, 3), TrialStatus(1, TrialState.RUNNING)))
    numbers = [int(line.split()[0]) for line in text.splitlines() if line.split() and line.split()[0].isdecimal()]
    shown = numbers[: numbers.index(60) + 1]
    assert shown[:2] == [1, 4] and len(shown) == SHOWN_ROWS and shown[2:] == list(range(33, 61))


def table(records: list[TrialRecord], statuses: dict[int, TrialStatus], folder: SweepFolder, width: int = 160) -> str:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=width, height=60, color_system=None)
    with LiveView(console, "eval/log_odds_chosen", 50, folder) as view:
        view.update(records, statuses)
    return terminal.getvalue()


def test_the_table_tells_phase_job_node_and_log(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    job = LocalJob(4711)
    records = [record(0, "queued", attempt=1, job=job, last_job=job), record(1, "queued", attempt=1)]
    statuses = {0: TrialStatus(1, TrialState.RUNNING, phase="frozen layers 43 %", host="node7")}
    text = table(records, statuses, folder)
    row = next(line for line in text.splitlines() if "frozen" in line)
    assert row.split() == ["1", "frozen", "layers", "43", "%", "1.0e-03", "0.1", "process", "4711", "node7"]
    assert any(line.split()[:2] == ["2", "waiting"] for line in text.splitlines())
    assert "log of 1: " in text and "4711_0_log.out" in text.replace("\n", "")
    narrow = table(records, statuses, folder, width=60)
    assert "node7" not in narrow and "43 %" in narrow and "…" not in narrow, "what does not fit is left out, not cut"


def resumed(step: int, since_s: float, from_step: int) -> TrialStatus:
    now = time.time()
    trained = {"trained_since": now - since_s, "trained_from": from_step}
    return TrialStatus(1, TrialState.RUNNING, step=step, max_steps=40, started=now - 900, **trained)


def test_the_time_left_counts_from_the_first_step_of_this_attempt() -> None:
    """Loading took 15 minutes here: it tells nothing of the steps."""
    assert trial_left_s(resumed(10, 20, 0)) == pytest.approx(60, abs=0.1), "2 s a step, 30 to go"
    assert trial_left_s(resumed(30, 20, 20)) == pytest.approx(20, abs=0.1), "after a resume at 20: 10 steps in 20 s"
    assert trial_left_s(resumed(20, 20, 20)) is None, "no step yet"
    assert trial_left_s(resumed(40, 40, 20)) == 0.0
    assert trial_left_s(TrialStatus(1, TrialState.RUNNING, step=0)) is None


def test_the_sweeps_time_left_counts_all_that_is_not_done() -> None:
    done = record(0, "completed", metric=0.1, seconds=100.0)
    running = record(1, "queued")
    stopped, made = record(2, "stopped"), record(3, "created")
    left = {1: resumed(10, 20, 0)}
    assert time_left_s([done], {}, 4) == pytest.approx(300)
    assert time_left_s([done, running], left, 4) == pytest.approx(60 + 200, abs=0.2)
    assert time_left_s([done, running, stopped, made], left, 4) == pytest.approx(60 + 200, abs=0.2), "known ones count too"
    assert time_left_s([done, running], {1: resumed(40, 40, 20)}, 2) == pytest.approx(0), "its last step is done"
    two = [done, running, record(4, "queued"), made]
    assert time_left_s(two, {1: left[1], 4: left[1]}, 4) == pytest.approx((60 + 60 + 100) / 2, abs=0.2)
    assert time_left_s([running], left, 3) == pytest.approx(60 + 2 * 960, abs=1), "before the first one has ended"
    assert time_left_s([record(0, "queued")], {}, 3) is None


def plain_lines(updates: list[TrialStatus], trials: int, folder: SweepFolder) -> list[str]:
    """What a pipe or a log gets of one trial's statuses."""
    out = io.StringIO()
    with LiveView(Console(file=out, width=200), "m", trials, folder) as view:
        job = SlurmJob("12_0")
        records = [record(i, "queued", attempt=1, job=job, last_job=job) for i in range(trials)]
        for status in updates:
            view.update(records, {0: status})
    return out.getvalue().splitlines()


def test_a_terminal_that_cannot_be_redrawn_hears_of_each_phase_once(tmp_path: Path) -> None:
    phases = ["loading the model", "loading the model", "frozen layers 10 %", "frozen layers 20 %", "training"]
    said = [TrialStatus(1, TrialState.RUNNING, phase=phase, host="node7") for phase in phases]
    lines = plain_lines(said, 1, SweepFolder(tmp_path))
    assert lines[0] == "trial 1/1 run-0: loading the model (job 12_0 on node7)"
    assert lines[1] == f"  its log: {tmp_path / 'jobs' / '12_0_0_log.out'}"
    assert lines[2:] == ["trial 1/1 run-0: frozen layers 10 %", "trial 1/1 run-0: training"]


def test_of_many_trials_only_what_comes_before_the_first_step_is_said(tmp_path: Path) -> None:
    began = TrialStatus(1, TrialState.RUNNING, phase="training", trained_since=time.time(), host="n")
    lines = plain_lines(
        [TrialStatus(1, TrialState.RUNNING, phase="loading the model", host="n"), began], 3, SweepFolder(tmp_path)
    )
    assert len(lines) == 2 and "loading the model" in lines[0]


def test_a_failed_trial_names_its_log(tmp_path: Path) -> None:
    out = io.StringIO()
    with LiveView(Console(file=out, width=80), "m", 3, SweepFolder(tmp_path)) as view:
        view.event(record(0, "failed", message="CUDA error: " + "x" * 100, last_job=SlurmJob("12_0")))
    assert f"  its log: {tmp_path / 'jobs' / '12_0_0_log.out'}" in out.getvalue().splitlines()


class Gone(io.StringIO):
    """A terminal that has gone."""

    def write(self, _text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_terminal_that_has_gone_does_not_end_the_sweep(tmp_path: Path) -> None:
    with LiveView(Console(file=Gone(), width=80), "m", 3, SweepFolder(tmp_path)) as view:
        view.event(record(0, "completed", metric=1.0, seconds=2.0))
        view.note("slurmctld does not answer")
        view.update([record(0, "queued", attempt=1)], {0: TrialStatus(1, TrialState.RUNNING, phase="training")})
