"""The table of faults in docs/slurm.md, row by row, on a real SLURM: real kills, real preemption, real limits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from conftest import PACE, events
from helpers import slurm_bed
from helpers.slurm_bed import Bed
from helpers.slurm_jobs import ONE, STEPS, count_calls, past
from helpers.sweeps import ended_states, start, statuses, stepping
from helpers.waiting import wait_for

from isaerft_sweep.dispatch.slurm.dispatcher import SlurmDispatcher
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.specs import LauncherSpec
from isaerft_sweep.trial.runner import run_trial

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # jobs cannot import tests
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("paced")]


def output(tmp_path: Path) -> str:
    return (tmp_path / "controller.out").read_text()


def finish(controller: subprocess.Popen[str], tmp_path: Path, code: int = 0, timeout_s: float = 400) -> list[dict[str, Any]]:
    """Wait for the controller; how the attempts ended."""
    assert controller.wait(timeout_s) == code, output(tmp_path)
    return [e for e in events(tmp_path / "outputs" / "s") if e["event"] == "end"]


def job_of(sweep: Path) -> str:
    """The job of the last dispatch."""
    return [e["job"]["job"]["id"] for e in events(sweep) if e["event"] == "dispatch"][-1]


def check_same_as_alone(sweep: Path, tmp_path: Path) -> None:
    """Every trial has, to the last bit, the numbers of one that nothing has happened to, in one W&B run."""
    for path in sorted((sweep / "trials").iterdir()):
        cut, whole = TrialFolder(path), TrialFolder(tmp_path / f"alone-{path.name}")
        whole.create(cut.read_spec())
        whole.begin_attempt(1)
        assert run_trial(whole, 1) == "completed"
        rows = [[{k: v for k, v in row.items() if k != "time"} for row in t.read_metrics()] for t in (cut, whole)]
        assert rows[0] == rows[1]
        steps = cut.read_spec().experiment.orpo.max_steps
        assert [row["step"] for row in rows[0] if "train/loss" in row] == list(range(1, steps + 1))
        states = [(t.adapter / "adapter_model.safetensors").read_bytes() for t in (cut, whole)]
        assert states[0] == states[1]
        runs = {p.name.rsplit("-", 1)[1] for p in path.glob("wandb/wandb/offline-run-*")}
        assert runs == {cut.read_spec().run_id}


@pytest.mark.parametrize(("setting", "number"), [("user_resv_delete", "SIGTERM"), ("preempt_send_user_signal", "SIGUSR2")])
@pytest.mark.long
def test_preemption(setting: str, number: str, slurm: Bed, tmp_path: Path) -> None:
    """By sites that send SIGTERM first, and by those that send what the job asked for with --signal."""
    sweep = tmp_path / "outputs" / "s"
    slurm.reconfigure("SlurmctldParameters", setting)
    try:
        controller = start(tmp_path, *ONE)
        wait_for(past(sweep, 12))
        urgent = ["sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"]
        slurm.command(*urgent)
        ends = finish(controller, tmp_path)
    finally:
        slurm.reconfigure("SlurmctldParameters", "user_resv_delete")
    assert [e["state"] for e in ends] == ["stopped", "completed"] and not ends[0]["counted"]
    log = (sweep / "jobs").glob("*_log.out")
    assert any(f"received {number}: checkpoint, then stop" in path.read_text() for path in log)
    assert slurm.jobs() == []
    check_same_as_alone(sweep, tmp_path)


@pytest.mark.long
def test_preemption_when_the_signal_is_swallowed(slurm: Bed, tmp_path: Path) -> None:
    """As NCCL or a C extension may do; here a thread mask that the whole process inherits."""
    sweep = tmp_path / "outputs" / "s"
    (tmp_path / "sitecustomize.py").write_text(
        PACE + "import signal\nif 'SLURM_STEP_ID' in os.environ and os.path.exists(os.environ['SWALLOW']):\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})\n"
    )
    swallow = tmp_path / "swallow"
    swallow.touch()
    lines = f"launcher.slurm.setup=['export PYTHONPATH={tmp_path} SWALLOW={swallow}']"
    controller = start(tmp_path, *ONE, lines, "launcher.slurm.partition=hasty", "orpo.max_steps=120")
    wait_for(past(sweep, 12))
    swallow.unlink()
    slurm.command("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    ends = finish(controller, tmp_path)
    assert [e["state"] for e in ends] == ["stopped", "completed"] and not ends[0]["counted"]
    assert "SLURM: PREEMPTED" in ends[0]["message"] and ends[0]["checkpoint"] > 0, "from its last checkpoint by steps"
    check_same_as_alone(sweep, tmp_path)


@pytest.mark.timeout(1200)  # a slow machine gets few steps into what is left of each minute
@pytest.mark.long
def test_a_time_limit_of_a_minute(slurm: Bed, tmp_path: Path) -> None:
    """Much of which the site's own setup lines take."""
    sweep = tmp_path / "outputs" / "s"
    options = (*ONE, "launcher.timeout_min=1", "launcher.slurm.setup=['sleep 10']", "orpo.max_steps=120")
    ends = finish(start(tmp_path, *options), tmp_path, timeout_s=900)
    assert len(ends) > 1 and ends[-1]["state"] == "completed"
    assert all(e["state"] == "stopped" and not e["counted"] and e["checkpoint"] > 0 for e in ends[:-1])
    assert "the job's time limit is near: checkpoint, then stop" in log_of(sweep, 0)
    assert slurm.jobs() == []
    check_same_as_alone(sweep, tmp_path)


@pytest.mark.long
def test_kill_9_of_a_worker_without_accounting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := slurm_bed.why_not():
        pytest.skip(reason)
    with slurm_bed.running_bed(accounting=False) as bed:
        monkeypatch.setenv("SLURM_CONF", str(bed.conf))
        sacct = subprocess.run(["sacct"], capture_output=True, text=True)
        assert "accounting storage is disabled" in sacct.stderr
        sweep = tmp_path / "outputs" / "s"
        controller = start(tmp_path, *ONE)
        os.kill(wait_for(past(sweep, 12))[0]["pid"], signal.SIGKILL)
        ends = finish(controller, tmp_path)
        assert [e["state"] for e in ends] == ["failed", "completed"]
        assert "ended without a word (SLURM: FAILED" in ends[0]["message"]
        assert re.search(rf"step \d+/{STEPS}: train/loss", ends[0]["message"]), "its last lines"
    check_same_as_alone(sweep, tmp_path)


def test_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM itself measures and kills: a trial needs some 600 MB and is given 256."""
    if reason := slurm_bed.why_not():
        pytest.skip(reason)
    limits = {
        "JobAcctGatherType": "jobacct_gather/linux",
        "JobAcctGatherParams": "OverMemoryKill",
        "JobAcctGatherFrequency": "task=1",
    }
    with slurm_bed.running_bed(accounting=False, **limits) as bed:
        monkeypatch.setenv("SLURM_CONF", str(bed.conf))
        done = start(tmp_path, *ONE, "launcher.max_retries=0", "launcher.slurm.mem_gb=0.25", "orpo.max_steps=100000")
        ends = finish(done, tmp_path, 1)
        assert [e["given_up"] for e in ends] == [True]
        assert "SLURM: " in ends[0]["message"] and "exceeded memory limit" in ends[0]["message"], ends


@pytest.mark.long
def test_a_lost_node(slurm: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slurmd is gone, but the worker lives on as an orphan: the attempt that takes its place must not meet it."""
    sweep = tmp_path / "outputs" / "s"
    monkeypatch.setenv("TEST_PACE_S", "0.6")  # the trial must outlast the half minute in which SLURM notices
    controller = start(tmp_path, *ONE, "orpo.max_steps=100")
    orphan = wait_for(past(sweep, 12))[0]["pid"]
    slurm.kill(slurm.command("squeue", "-h", "-o", "%N").strip())
    lost = wait_for(lambda: [e for e in events(sweep) if e["event"] == "end"])[0]
    assert lost["state"] == "stopped" and "SLURM: NODE_FAIL" in lost["message"] and not lost["counted"]
    wait_for(past(sweep, lost["checkpoint"], attempt=2))
    assert wait_for(lambda: "was replaced by attempt 2" in log_of(sweep, 0)), "the orphan sees that it is one"
    assert stepping(sweep)[0]["pid"] != orphan
    assert [e["state"] for e in finish(controller, tmp_path)] == ["stopped", "completed"]
    check_same_as_alone(sweep, tmp_path)


def log_of(sweep: Path, number: int) -> str:
    """What the job of the given dispatch has printed."""
    job = [e["job"]["job"]["id"] for e in events(sweep) if e["event"] == "dispatch"][number]
    return (sweep / "jobs" / f"{job}_0_log.out").read_text()


@pytest.mark.long
def test_scancel_of_one_task_and_then_of_the_whole_array(slurm: Bed, tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    two = ("sweep.run_cap=2", "launcher.slots=2")
    controller = start(tmp_path, *ONE, *two)
    wait_for(lambda: len(past(sweep, 10)()) == 2)
    first = [e["job"]["job"]["id"] for e in events(sweep) if e["event"] == "dispatch"]
    assert first[0].endswith("_0") and first[1].endswith("_1"), "two workers, one array"
    slurm.command("scancel", first[0])
    wait_for(lambda: len([e for e in events(sweep) if e["event"] == "dispatch"]) == 3)
    slurm.command("scancel", first[1].split("_")[0])
    ends = finish(controller, tmp_path)
    cut = [e for e in ends if e["state"] != "completed"]
    assert ended_states(sweep)["completed"] == 2 and len(cut) == 2
    assert all(e["state"] == "failed" and e["counted"] and "SLURM: CANCELLED" in e["message"] for e in cut)
    check_same_as_alone(sweep, tmp_path)


@pytest.mark.long
def test_slurmctld_is_killed_and_started_again(slurm: Bed, tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    two = (*ONE, "sweep.run_cap=2", "launcher.trials_per_job=1")
    controller = start(tmp_path, *two)
    wait_for(past(sweep, 12))
    slurm.kill("slurmctld")
    first = next((sweep / "trials").iterdir())
    wait_for(lambda: json.loads((first / "status.json").read_text())["state"] == "completed")
    time.sleep(2)  # the trial is over and its job cannot be asked after, nor the next one be submitted
    slurm.start_controller()
    ends = finish(controller, tmp_path)
    assert [(e["index"], e["state"]) for e in ends if e["state"] == "completed"] == [(0, "completed"), (1, "completed")]
    # a slurmctld that has just begun does not know its nodes' GPUs yet and may refuse a job's first step
    refused = [e for e in ends if e["state"] != "completed"]
    assert all(e["index"] == 1 and "Unable to create step" in e["message"] for e in refused), ends


@pytest.mark.long
def test_kill_9_of_the_controller_with_jobs_running_and_pending(slurm: Bed, tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    # only one may run at a time, the other waits in the queue
    options = (*ONE, "sweep.run_cap=3", "launcher.slots=2", "launcher.slurm.array_parallelism=1")
    controller = start(tmp_path, *options)
    wait_for(past(sweep, 10))
    controller.kill()
    controller.wait()
    assert len(slurm.jobs()) == 2
    stray = [f"--job-name={slurm.command('squeue', '-h', '-o', '%j').split()[0]}", "--output=/dev/null", "--wrap=sleep 600"]
    stray_id = slurm.command("sbatch", "--parsable", *stray).strip()  # as if it had died between sbatch and its journal
    ends = finish(start(tmp_path, *options), tmp_path)
    assert [e["state"] for e in ends] == ["completed"] * 3
    dispatched = sorted(e["index"] for e in events(sweep) if e["event"] == "dispatch")
    assert dispatched == [0, 1, 2], "those that ran or waited were adopted, not run again"
    assert slurm.jobs() == []
    assert "CANCELLED" in slurm.command("squeue", "-h", "-t", "all", "-o", "%T", "-j", stray_id)


@pytest.mark.long
def test_ctrl_c_leaves_nothing_in_the_queue(slurm: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = tmp_path / "outputs" / "s"
    calls = count_calls(tmp_path, monkeypatch, "scancel")
    options = (*ONE, "sweep.run_cap=40", "launcher.slots=12", "orpo.max_steps=100000", "launcher.slurm.array_parallelism=2")
    controller = start(tmp_path, *options)
    wait_for(lambda: len(past(sweep, 2)()) == 2)
    assert len(slurm.jobs()) == 12
    controller.send_signal(signal.SIGINT)
    finish(controller, tmp_path, 130)
    assert slurm.jobs() == [] and ended_states(sweep) == {"stopped": 12}
    lines = calls.read_text().splitlines()
    array = job_of(sweep).split("_")[0]
    assert lines == [f"--state=PENDING {array}", f"--signal=TERM --state=RUNNING {array}"], (
        "one for what waits, one for what runs"
    )
    assert len([s for s in statuses(sweep) if s["state"] == "stopped"]) == 2


@pytest.mark.long
def test_a_worker_that_always_dies_under_a_slow_scheduler(
    slurm: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tmp_path / "outputs" / "s"
    calls = count_calls(tmp_path, monkeypatch, "squeue", "sacct", "sbatch", delay_s=2)
    controller = start(tmp_path, *ONE, "launcher.max_retries=1", "orpo.max_steps=100000")
    for attempt in (1, 2):
        os.kill(wait_for(past(sweep, 1, attempt))[0]["pid"], signal.SIGKILL)
        wait_for(lambda n=attempt: len([e for e in events(sweep) if e["event"] == "end"]) == n)
    ends = finish(controller, tmp_path, 1)
    assert [e["given_up"] for e in ends] == [False, True] and slurm.jobs() == []
    assert output(tmp_path).count("SLURM: FAILED") >= 2
    assert "sacct" not in calls.read_text(), "squeue still remembers the job: accounting is a second opinion"


SLOW_DISK = """
import os, time
# Stands in for a slow shared file system: every call that has to ask its server takes a third of a second.
def slowly(call):
    def waits(*args, **kwargs):
        if any(FOLDER in os.fsdecode(a) for a in args[:2] if isinstance(a, (str, bytes, os.PathLike))) or call is fsync:
            time.sleep(0.3)
        return call(*args, **kwargs)
    return waits
fsync, FOLDER = os.fsync, os.environ["SLOW_FOLDER"]
for name in ("fsync", "replace", "rename", "link", "mkdir", "unlink"):
    setattr(os, name, slowly(getattr(os, name)))
"""


@pytest.mark.long
def test_a_slow_shared_disk(slurm: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the controller as for the trials; nothing is taken for dead."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW_DISK)
    sweep = tmp_path / "outputs" / "s"
    monkeypatch.setenv("SLOW_FOLDER", str(sweep))
    path = os.pathsep.join(filter(None, [str(tmp_path / "slow"), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)  # jobs inherit both
    began = time.monotonic()
    ends = finish(start(tmp_path, *ONE, "sweep.run_cap=2", "launcher.slots=2", "orpo.max_steps=20"), tmp_path)
    assert [e["state"] for e in ends] == ["completed"] * 2 and time.monotonic() - began > 10, "it was slow"
    assert len([e for e in events(sweep) if e["event"] == "dispatch"]) == 2 and slurm.jobs() == []
    check_same_as_alone(sweep, tmp_path)


def test_accounting_knows_what_squeue_has_forgotten(slurm: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a controller comes back after days: one question for all jobs."""
    spec = LauncherSpec(kind="slurm", slots=3, slurm={"partition": "main"})
    dispatcher = SlurmDispatcher(spec, tmp_path / "s" / "jobs")
    refs = dispatcher.submit_all([Dies(), Dies(), Dies()])  # type: ignore[list-item]
    wait_for(lambda: not any(dispatcher.alive(refs)))
    told = dispatcher.job_exit(refs[0])
    assert told.reason.startswith("SLURM: FAILED")
    slurm.reconfigure("MinJobAge", "2")
    try:
        job = refs[0].id.split("_")[0]
        wait_for(lambda: job not in slurm.command("squeue", "-h", "-t", "all", "-o", "%A").split())
    finally:
        slurm.reconfigure("MinJobAge", "600")
    later = SlurmDispatcher(spec, tmp_path / "s" / "jobs")
    calls = count_calls(tmp_path, monkeypatch, "sacct")
    for _ in range(2):
        assert later.alive(refs) == [False] * 3
        for ref in refs:
            assert later.job_exit(ref).reason.startswith("SLURM: FAILED") and later.job_exit(ref).cause == told.cause
    assert len(calls.read_text().splitlines()) == 1


@pytest.mark.long
def test_a_suspended_job_is_not_taken_for_hung(slurm: Bed, tmp_path: Path) -> None:
    """As by gang scheduling (PreemptMode=SUSPEND) or by an administrator."""
    sweep = tmp_path / "outputs" / "s"
    controller = start(tmp_path, *ONE, "launcher.heartbeat_s=15", "tracker=disabled")
    wait_for(past(sweep, 10))
    job = job_of(sweep)
    slurm.command("scontrol", "suspend", job)
    time.sleep(22)
    assert slurm.command("squeue", "-h", "-o", "%T", "-j", job).split() == ["SUSPENDED"]
    slurm.command("scontrol", "resume", job)
    ends = finish(controller, tmp_path)
    assert [e["state"] for e in ends] == ["completed"] and slurm.jobs() == []


@dataclass
class Dies:
    """A job that is killed."""

    limit_s: float | None = None

    def __call__(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
def test_a_full_shared_disk(slurm: Bed, tmp_path: Path) -> None:
    disk = tmp_path / "outputs"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a disk of its own cannot be mounted here")
    try:
        sweep = disk / "s"
        options = (*ONE, "launcher.min_free_gb=0.02", "launcher.max_retries=0", "sweep.run_cap=2")
        controller = start(tmp_path, *options)
        wait_for(past(sweep, 12))
        with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"0" * 65536)
        assert controller.wait(400) == 2 and "cannot be written (No space left on device)" in output(tmp_path), output(
            tmp_path
        )
        assert "Traceback" not in output(tmp_path)
        (disk / "filler").unlink()
        finish(start(tmp_path, *options), tmp_path)
        assert slurm.jobs() == []
        check_same_as_alone(sweep, tmp_path)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.long
def test_more_workers_than_there_is_room_for(slurm: Bed, tmp_path: Path) -> None:
    """Six are asked for and two may run: they run all trials, and the jobs of the others leave the queue."""
    sweep = tmp_path / "outputs" / "s"
    options = ("sweep.run_cap=8", "launcher.slots=6", "launcher.slurm.array_parallelism=2", "orpo.max_steps=12")
    ends = finish(start(tmp_path, *ONE, *options, "tracker=disabled"), tmp_path)
    assert ended_states(sweep)["completed"] == 8 and slurm.jobs() == []
    assert [e["state"] for e in ends] == ["completed"] * 8
    assert len({s["pid"] for s in statuses(sweep)}) == 2, "no third worker had to load anything"


@pytest.mark.long
def test_a_job_that_is_completing_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epilog hangs on the node of the first trial's job: the trial goes on elsewhere."""
    if reason := slurm_bed.why_not():
        pytest.skip(reason)
    (tmp_path / "epilog").write_text(f"#!/bin/bash\nwhile [ ! -e {tmp_path}/go ]; do sleep 0.5; done\n")
    (tmp_path / "epilog").chmod(0o755)
    with slurm_bed.running_bed(accounting=False, Epilog=str(tmp_path / "epilog")) as bed:
        monkeypatch.setenv("SLURM_CONF", str(bed.conf))
        sweep = tmp_path / "outputs" / "s"
        controller = start(tmp_path, *ONE)
        victim = wait_for(past(sweep, 12))[0]["pid"]
        first = job_of(sweep)
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: bed.command("squeue", "-h", "-o", "%T", "-j", first).split() == ["COMPLETING"])
        ends = wait_for(lambda: [e for e in events(sweep) if e["event"] == "end"], timeout_s=200)
        assert ends[0]["state"] == "stopped" and "SLURM: COMPLETING" in ends[0]["message"]
        wait_for(past(sweep, ends[0]["checkpoint"], attempt=2))
        (tmp_path / "go").touch()
        finish(controller, tmp_path)
    check_same_as_alone(sweep, tmp_path)
