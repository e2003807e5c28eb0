"""Leaving a sweep, looking at it, coming back to it, ending it from outside: on a real SLURM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import events, launch_command, processes_of
from helpers.slurm_bed import Bed
from helpers.slurm_jobs import ONE, past
from helpers.sweeps import ended_states
from helpers.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("paced")]
OPTIONS = (*ONE, "tracker=disabled")


def cli(*arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isaerft_sweep.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.mark.long
def test_detach_status_attach_cancel(slurm: Bed, launch: Callable, tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    left = launch(*OPTIONS, "sweep.run_cap=2", "orpo.max_steps=80", "--detach")
    assert left.returncode == 0 and "isaerft-sweep attach" in left.stdout, left.stdout + left.stderr
    controller = psutil.Process(json.loads((sweep / "controller.json").read_text())["pid"])
    again = launch(*OPTIONS, "sweep.run_cap=2", "orpo.max_steps=80", "--detach")
    assert again.returncode == 2 and "already run by process" in again.stderr
    wait_for(past(sweep, 20))
    status = cli("status", str(sweep)).stdout
    assert "0 of 2 ended" in status and f"process {controller.pid} on" in status and "1 running" in status, status

    leaving = subprocess.Popen(
        [sys.executable, "-m", "isaerft_sweep.cli", "attach", str(sweep)], stdout=subprocess.PIPE, text=True
    )
    wait_for(lambda: leaving.stdout and "Ctrl-C leaves it running" in leaving.stdout.readline())
    leaving.send_signal(signal.SIGINT)
    assert leaving.communicate(timeout=30)[0].strip().endswith("Left. The sweep continues.") and controller.is_running()

    cancelled = cli("cancel", str(sweep))
    assert cancelled.returncode == 0 and "is left running; 0 of 2 trials" in cancelled.stdout, (
        cancelled.stdout + cancelled.stderr
    )
    assert slurm.jobs() == [] and ended_states(sweep) == {"stopped": 1}
    wait_for(lambda: not processes_of(tmp_path))
    assert "resume it with  isaerft-sweep attach" in cli("status", str(sweep)).stdout

    assert cli("attach", str(sweep)).returncode == 0, "attach goes on with a sweep that nobody runs"
    assert ended_states(sweep) == {"stopped": 1, "completed": 2}
    assert "none: the sweep has ended" in cli("status", str(sweep)).stdout
    spec = json.loads(next((sweep / "trials").iterdir()).joinpath("spec.json").read_text())
    assert "orpo.max_steps=80" in spec["command"]


def test_status_tells_why_jobs_wait(slurm: Bed, launch: Callable, tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    options = ("sweep.run_cap=2", "launcher.slots=2", "+launcher.slurm.hold=true", "--detach")
    assert launch(*OPTIONS, *options).returncode == 0
    wait_for(lambda: len(slurm.jobs()) == 2)
    status = cli("status", str(sweep)).stdout
    assert "waiting     2 in the queue: JobHeldUser" in status, status
    assert cli("cancel", str(sweep)).returncode == 0 and slurm.jobs() == []


def test_detach_shows_why_it_cannot(slurm: Bed, launch: Callable) -> None:
    done = launch(*OPTIONS, "launcher.slurm.partition=mian", "--detach")
    assert done.returncode == 2 and "Did you mean 'main'?" in done.stderr


def test_cancel_now_kills_at_once(slurm: Bed, tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    options = (*OPTIONS, "orpo.max_steps=100000", "orpo.checkpoint_every_steps=100000")
    controller = subprocess.Popen(launch_command(*options), cwd=tmp_path, stdout=subprocess.DEVNULL)
    wait_for(past(sweep, 10))
    done = cli("cancel", "--now", str(sweep))
    assert done.returncode == 0 and "is left running" in done.stdout, done.stderr
    assert controller.wait(60) == 130 and slurm.jobs() == [] and ended_states(sweep) == {"stopped": 1}
    wait_for(lambda: not processes_of(tmp_path))


@pytest.mark.long
def test_cancel_after_a_kill_9_of_the_controller(slurm: Bed, tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    with (tmp_path / "controller.out").open("w") as log:
        controller = subprocess.Popen(
            launch_command(*OPTIONS, "orpo.max_steps=100000", "launcher.slots=2", "sweep.run_cap=2"),
            cwd=tmp_path,
            stdout=log,
        )
    wait_for(past(sweep, 10))
    controller.kill()
    controller.wait()
    assert len(slurm.jobs()) == 2
    # another controller adopts them, and can be left though nothing new happens
    options = ("orpo.max_steps=100000", "launcher.slots=2", "sweep.run_cap=2")
    left = subprocess.run(launch_command(*OPTIONS, *options, "--detach"), cwd=tmp_path, timeout=120, capture_output=True)
    assert left.returncode == 0 and b"isaerft-sweep attach" in left.stdout, left.stderr
    adopted = json.loads((sweep / "controller.json").read_text())["pid"]
    psutil.Process(adopted).kill()
    wait_for(lambda: not psutil.pid_exists(adopted))
    assert len(slurm.jobs()) == 2 and len([e for e in events(sweep) if e["event"] == "dispatch"]) == 2
    done = cli("cancel", str(sweep))
    assert done.returncode == 0, done.stderr
    assert slurm.jobs() == [] and ended_states(sweep) == {"stopped": 2}
    assert not [e for e in events(sweep) if e["event"] == "end" and e["given_up"]]


@pytest.mark.long
def test_the_controller_as_a_job_submits_the_rest_and_is_queued_again(slurm: Bed, tmp_path: Path) -> None:
    """The template ``slurm/controller.sbatch`` as it is: preempted, it stops in order and goes on in its second run."""
    sweep = tmp_path / "outputs" / "s"
    template = Path(__file__).parent.parent / "slurm" / "controller.sbatch"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = [o for o in OPTIONS if o != "launcher=slurm"]
    job = subprocess.run(
        ["sbatch", "--parsable", "--time=60", "--partition=urgent", str(template), *options, "sweep.run_cap=2", "orpo.max_steps=80"],
        cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    wait_for(past(sweep, 10))
    assert f"SLURM job {job}" in cli("status", str(sweep)).stdout
    slurm.command("scancel", "--batch", "--signal=TERM", job)
    wait_for(lambda: slurm.command("squeue", "-h", "-o", "%T", "-j", job).strip() == "PENDING")
    assert ended_states(sweep) == {"stopped": 1} and slurm.jobs() == [job], "its trials have ended before it is queued again"
    wait_for(lambda: slurm.jobs() == [], timeout_s=200)
    assert ended_states(sweep) == {"stopped": 1, "completed": 2}, (tmp_path / f"isaerft-sweep-{job}.out").read_text()
