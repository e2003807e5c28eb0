"""Leaving a sweep and coming back: with whose settings it goes on, whether it is asked first, requests that come early."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import TINY, events, launch_command, processes_of
from helpers.slurm_bed import Bed
from helpers.slurm_jobs import TEMPLATES, sbatch
from helpers.sweeps import ended_states, start, stepping
from helpers.waiting import wait_for

from isaerft_sweep.controller.run_controller import closed_in_the_end, disk_errors_named
from isaerft_sweep.controller.session import has_begun, read_experiment
from isaerft_sweep.controller.static_array import argument, running_arrays
from isaerft_sweep.controller.stop_signal import StopRequest, ask_to_stop, process_began
from isaerft_sweep.dispatch.base import Dispatcher
from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.search.sweep_file import Metric, SweepDefinition

OFF = (*TINY, "name=s", "tracker=disabled")


def cli(cwd: Path, *arguments: str, said: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isaerft_sweep.cli", *arguments]
    return subprocess.run(command, cwd=cwd, input=said or "", capture_output=True, text=True, timeout=300, check=False)


def on_a_terminal(cwd: Path, answer: str, *arguments: str) -> tuple[int, str]:
    """A command with a terminal for its input, where somebody answers."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "isaerft_sweep.cli", *arguments]
    process = subprocess.Popen(command, cwd=cwd, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    os.close(theirs)
    os.write(ours, f"{answer}\n".encode())
    said = process.communicate(timeout=300)[0]
    os.close(ours)
    return process.returncode, said


def test_a_request_to_stop_is_heard_from_the_process_s_start_on(tmp_path: Path) -> None:
    file = tmp_path / "cancel"
    assert abs(process_began() - psutil.Process().create_time()) < 2
    ask_to_stop(file, at_once=True)
    request = StopRequest(file)
    with request.signals_counted():
        assert request.urgency == 2, "it came before the controller listened, and after it was started"
    assert not file.exists(), "and is over with it"
    ask_to_stop(file, at_once=False)
    os.utime(file, (process_began() - 1, process_began() - 1))
    with request.signals_counted():
        assert request.urgency == 0, "meant for an earlier one"
        ask_to_stop(file, at_once=False)
        assert request.urgency == 1


@pytest.mark.slow
def test_cancel_right_after_a_start(tmp_path: Path) -> None:
    """Long before the controller listens: while it checks model and data, and before it holds the sweep at all."""
    sweep = tmp_path / "outputs" / "s"
    for after in (lambda: (sweep / "journal.jsonl").exists(), lambda: True):
        controller = start(tmp_path, *OFF, "orpo.max_steps=100000", "sweep.run_cap=2")
        wait_for(after)
        done = cli(tmp_path, "cancel", "outputs/s")
        assert done.returncode == 0 and "is left running; 0 of" in done.stdout, done.stderr
        assert controller.wait(120) == 130, (tmp_path / "controller.out").read_text()
        assert processes_of(tmp_path) == [] and not (sweep / "cancel").exists()


@pytest.mark.slow
def test_attach_goes_on_with_the_last_command(launch: Callable, tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    assert launch(*OFF, "sweep.run_cap=1").returncode == 0
    more = start(tmp_path, *OFF, "sweep.run_cap=3", "launcher.max_retries=7", "launcher.slots=2")
    wait_for(lambda: len([e for e in events(sweep) if e["event"] == "dispatch"]) == 3)
    more.kill()
    more.wait()
    experiment = read_experiment(SweepFolder(sweep))
    assert (experiment.sweep.run_cap, experiment.launcher.max_retries, experiment.launcher.slots) == (3, 7, 2)
    done = cli(tmp_path, "attach", "outputs/s")
    assert done.returncode == 0 and ended_states(sweep) == {"completed": 3}, done.stderr
    refused = launch(*OFF, "sweep.run_cap=5", "launcher.min_free_gb=1000000000")
    assert refused.returncode == 2 and read_experiment(SweepFolder(sweep)).sweep.run_cap == 3, "that one was none"


@pytest.mark.slow
def test_attach_asks_before_it_trains_on_this_machine(tmp_path: Path) -> None:
    made = cli(tmp_path, "make", *OFF, "sweep.method=random", "sweep.run_cap=2")
    assert made.returncode == 0, made.stderr
    sweep = tmp_path / "outputs" / "s"
    refused = cli(tmp_path, "attach", "outputs/s")
    assert refused.returncode == 2 and "isaerft-sweep attach --here" in refused.stderr and refused.stderr.count("\n") == 1
    code, said = on_a_terminal(tmp_path, "n", "attach", "outputs/s")
    assert code == 1 and "2 of 2 trials are left" in said and "no trial was started" in said
    assert not [e for e in events(sweep) if e["event"] == "dispatch"]
    code, said = on_a_terminal(tmp_path, "y", "attach", "outputs/s")
    assert code == 0 and ended_states(sweep) == {"completed": 2}, said
    again = cli(tmp_path, "attach", "outputs/s")
    assert again.returncode == 0 and "Leaderboard" in again.stdout, "nothing is left to be trained: nothing to ask"


@pytest.mark.slow
def test_jobs_of_another_launcher_are_not_taken_for_ones_own(launch: Callable, tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    controller = start(tmp_path, *OFF, "orpo.max_steps=100000", "sweep.run_cap=1")
    wait_for(lambda: stepping(sweep))
    controller.kill()
    controller.wait()
    done = launch(*OFF, "orpo.max_steps=100000", "sweep.run_cap=1", "launcher.resident=false")
    assert done.returncode == 2 and "launcher=local launcher.resident=true has started" in done.stderr, done.stderr
    config = yaml.safe_load((sweep / "config.yaml").read_text())
    config["launcher"]["resident"] = False
    (sweep / "config.yaml").write_text(yaml.safe_dump(config))
    ended = cli(tmp_path, "cancel", "outputs/s")
    assert ended.returncode == 0 and processes_of(tmp_path) == [], ended.stderr


def test_a_trial_that_was_given_up_among_others_is_told(experiment: Any, tmp_path: Path) -> None:
    from rich.console import Console

    from isaerft_sweep.controller.run_sweep import SweepRun, conclude
    from isaerft_sweep.journal.journal import Journal
    from isaerft_sweep.search.sampler import FixedPoints

    folder = SweepFolder(tmp_path / "s")
    journal = Journal(folder)
    journal.write("sweep", sweep_id="s", question="q", metric="eval/loss", goal="minimize")
    for i, state in enumerate(("completed", "failed")):
        journal.write("trial", index=i, name=f"run-{i}", run_id=f"{i}", params={"orpo.beta": 0.1 * (i + 1)}, unit={})
        facts = {"metric": 0.5 if i == 0 else None, "message": "out of [bold]memory\nmore", "seconds": 1.0}
        journal.write("end", index=i, state=state, given_up=state == "failed", **facts)
    console = Console(record=True, width=200)
    definition = SweepDefinition("random", Metric("eval/loss", "minimize"), {})
    run = SweepRun(experiment(*TINY), definition, FixedPoints([]), folder)
    assert conclude(run, console, journal, 2, stopped=False, show=False) == 1
    said = console.export_text()
    assert "Trial 2 was given up. The same command tries it again" in said
    journal.close()


def test_when_a_controller_in_the_background_can_be_left(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    point = {"index": 0, "name": "r", "run_id": "0", "params": {}, "unit": {}}
    lines = [
        {"event": "sweep", "sweep_id": "s", "question": "q", "metric": "m", "goal": "maximize"},
        {"event": "trial", **point},
    ]
    folder.journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    begun = folder.journal.stat().st_size
    assert not has_begun(folder, 0, time.time()), "a trial is made, and the queue may still refuse it"
    with folder.journal.open("a") as file:
        file.write(
            json.dumps({"event": "dispatch", "index": 0, "attempt": 1, "job": {"kind": "local", "pid": 1}}) + '\n{"torn'
        )
    assert has_begun(folder, begun, time.time())
    whole = len(folder.journal.read_bytes().rpartition(b'{"torn')[0])
    assert not has_begun(folder, whole, time.time()) and has_begun(folder, whole, time.time() - 30), "it adopts that one"


@pytest.mark.slow
def test_detach_says_that_the_first_job_was_refused(slurm: Bed, launch: Callable) -> None:
    flags = ("launcher=slurm", "launcher.poll_s=0.3", "+launcher.slurm.licenses=nonsense:1", "sweep.run_cap=1")
    done = launch(*OFF, *flags, "--detach")
    assert done.returncode == 2 and "sbatch refused the job" in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and slurm.jobs() == []


class Closing(Dispatcher):
    """A place that cannot be closed."""

    slots, threads = 1, None

    def close(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/elsewhere")

    submit_all = alive = cancel = kill = log_tail = None  # type: ignore[assignment]


def test_the_first_error_is_told(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    with (
        pytest.raises(FolderError, match="/here cannot be written"),
        disk_errors_named(folder),
        closed_in_the_end(Closing()),
    ):
        raise OSError(errno.EDQUOT, "Quota exceeded", "/here")
    with (
        pytest.raises(FolderError, match="/elsewhere cannot be written"),
        disk_errors_named(folder),
        closed_in_the_end(Closing()),
    ):
        pass


FULL = """
import os
# Stands in for a disk that is full from the first time on that FULL_AT is written.
full = False
def fails(call):
    def checked(*args, **kwargs):
        global full
        full = full or any(os.environ["FULL_AT"] in str(a) for a in args[:2] if isinstance(a, (str, os.PathLike)))
        if full and any(os.environ["FULL_BELOW"] in str(a) for a in args[:2] if isinstance(a, (str, os.PathLike))):
            raise OSError(28, "No space left on device", str(args[0]))
        return call(*args, **kwargs)
    return checked
if "isaerft_sweep.launch" in " ".join(open("/proc/self/cmdline").read().split("\\0")):
    for name in ("replace", "link", "mkdir"):
        setattr(os, name, fails(getattr(os, name)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "at", ["sweep.yaml", "controller.json", "environment.json", "attempt.json", "leaderboard.csv", "task-1.json"]
)
@pytest.mark.long
def test_a_disk_that_is_full_at_any_file_of_the_controller_s_own(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "sitecustomize.py").write_text(FULL)
    monkeypatch.setenv("FULL_AT", at)
    monkeypatch.setenv("FULL_BELOW", str(tmp_path / "outputs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path / 'full'}:{os.environ.get('PYTHONPATH', '')}")
        done = subprocess.run(
            launch_command(*OFF, "sweep.run_cap=1"), cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 2 and "cannot be written (No space left on device)" in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    wait_for(lambda: processes_of(tmp_path) == [], timeout_s=90)
    again = subprocess.run(
        launch_command(*OFF, "sweep.run_cap=1"), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0 and ended_states(tmp_path / "outputs" / "s")["completed"] == 1, again.stderr


def test_the_folder_that_a_script_was_given(tmp_path: Path) -> None:
    for name in ("my sweep", "my", "sweep", "a  b=c d|e"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "journal.jsonl").touch()
    for script in (tmp_path / "trials.sbatch", tmp_path / "my scripts" / "trials.sbatch"):
        script.parent.mkdir(exist_ok=True)
        script.touch()
        for name in ("my sweep", "my", "a  b=c d|e"):
            assert argument(f"{script} outputs/{name}", tmp_path) == tmp_path / "outputs" / name
            assert argument(f"{script} {tmp_path}/outputs/{name} more", tmp_path) == tmp_path / "outputs" / name
        assert argument(f"{script} gone", tmp_path) == tmp_path / "gone"
    assert argument("/gone/trials.sbatch outputs/my sweep", tmp_path) == tmp_path / "outputs" / "my sweep"
    assert argument("/gone/trials.sbatch", tmp_path) == tmp_path


@pytest.mark.slow
def test_cancel_of_an_array_whose_path_has_spaces(slurm: Bed, tmp_path: Path) -> None:
    place = tmp_path / "a b=c 'd"
    place.mkdir()
    options = (*TINY, "tracker=disabled", "sweep.method=random", "sweep.run_cap=2", f"output='{tmp_path}/my out'")
    for name in ("s", "other"):
        assert cli(tmp_path, "make", *options, f"name={name}").returncode == 0
    jobs = {
        name: sbatch(place, "--hold", "--array=0-1", str(TEMPLATES / "trials.sbatch"), f"../my out/{name}")
        for name in ("s", "other")
    }
    assert set(running_arrays(tmp_path / "my out" / "s")) == {jobs["s"]}
    refused = cli(tmp_path, "attach", "my out/s")
    assert refused.returncode == 2 and f"SLURM's jobs {jobs['s']} run trials of" in refused.stderr
    ended = cli(tmp_path, "cancel", "my out/s")
    assert ended.returncode == 0 and "is left running; 0 of 2" in ended.stdout, ended.stderr
    assert {job.split("_")[0] for job in slurm.jobs()} == {jobs["other"]}
