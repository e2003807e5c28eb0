"""What SLURM costs through this package: beside bare submitit, to poll, to ask how far a sweep is.

    python benchmarks/slurm.py [--jobs 200] [--trials 10000]

On the tests' own SLURM (``tests/helpers/slurm_bed.py``): real daemons, four nodes on this machine. The jobs of the first
table do nothing; both sides submit them as one array and wait until every one has ended, asking once a second. The calls of
the second are counted by wrappers around the real commands, which come first in PATH.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import submitit
from rich.console import Console
from rich.table import Table

from isaerft_sweep.dispatch.slurm.dispatcher import SlurmDispatcher, outside_of_any_job
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.specs import LauncherSpec

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.slurm_bed import running_bed, which, why_not

POLL_S = 1.0
REPEATS = 2
COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "sinfo", "scancel", "sacctmgr")


@dataclasses.dataclass(frozen=True)
class Nothing:
    """A job."""

    threads: int | None = None
    device: str | None = None
    limit_s: float | None = None

    def __call__(self) -> str:
        return "done"


def with_submitit(jobs: int, folder: Path) -> float:
    """Seconds from submission to the end of the last job, as submitit's own users do it."""
    started = time.perf_counter()
    executor = submitit.SlurmExecutor(folder=folder)
    executor.update_parameters(time=10, cpus_per_task=1, mem="100MB", array_parallelism=jobs, stderr_to_stdout=True)
    with outside_of_any_job(), executor.batch():
        submitted = [executor.submit(Nothing()) for _ in range(jobs)]
    while not all(job.done() for job in submitted):
        time.sleep(POLL_S)
    assert all(job.result() == "done" for job in submitted)
    return time.perf_counter() - started


def with_ours(jobs: int, folder: Path) -> float:
    """The same through the dispatcher: reading the cluster and the snapshot of the code included."""
    started = time.perf_counter()
    flags = {"cpus_per_task": 1, "mem": "100MB", "gpus_per_node": 0}
    dispatcher = SlurmDispatcher(LauncherSpec(kind="slurm", slots=jobs, timeout_min=10, slurm=flags), folder)
    refs = dispatcher.submit_all([Nothing() for _ in range(jobs)])  # type: ignore[misc]
    assert len(refs) == jobs
    while any(dispatcher.alive(refs)):
        time.sleep(POLL_S)
    seconds = time.perf_counter() - started
    assert len(list(folder.glob("*_result.pkl"))) == jobs
    return seconds


def processor_s() -> float:
    """Processor time of this process and of the commands that it has called; the jobs are not among them."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def overhead(jobs: int, work: Path) -> Table:
    """Both in turn, so that a machine that is slow for a while is slow for both."""
    table = Table(title=f"{jobs} jobs that do nothing, in one array")
    for name in ("run", "bare submitit s", "ours s", "ratio", "submitter's processor s: bare", "ours"):
        table.add_column(name, justify="right")
    ratios = []
    for run in range(1, REPEATS + 1):
        wall, cpu = {}, {}
        for side in (with_submitit, with_ours) if run % 2 else (with_ours, with_submitit):
            before = processor_s()
            wall[side] = side(jobs, work / f"{side.__name__}{run}" / "jobs")
            cpu[side] = processor_s() - before
        ratios.append(wall[with_ours] / wall[with_submitit])
        seconds = [wall[with_submitit], wall[with_ours], cpu[with_submitit], cpu[with_ours]]
        shown = [f"{value:.1f}" for value in seconds]
        table.add_row(str(run), *shown[:2], f"{ratios[-1]:.3f}", *shown[2:])
    table.add_row("median", "", "", f"{statistics.median(ratios):.3f}", "", "")
    return table


def wrapped(work: Path) -> Path:
    """Wrappers that note every call of one of ``COMMANDS`` in the file that is returned."""
    calls, folder = work / "calls", work / "bin"
    folder.mkdir()
    for name in COMMANDS:
        script = folder / name
        script.write_text(f'#!/bin/bash\necho {name} >>{calls}\nexec {which(name)} "$@"\n')
        script.chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    return calls


def polling(work: Path, clear: Any) -> Table:
    """Calls of SLURM's commands per poll, for queues of different lengths."""
    table = Table(title="Polling")
    for name in ("jobs", "sbatch calls", "calls per poll", "ms per poll"):
        table.add_column(name, justify="right")
    calls = wrapped(work)
    for jobs in (1, 10, 100, 1000):
        flags = {"cpus_per_task": 1, "mem": "100MB", "gpus_per_node": 0, "hold": True}
        spec = LauncherSpec(kind="slurm", slots=jobs, slurm=flags)
        dispatcher = SlurmDispatcher(spec, work / f"polled{jobs}" / "jobs")
        calls.write_text("")
        refs = dispatcher.submit_all([Nothing() for _ in range(jobs)])  # type: ignore[misc]
        assert len(refs) == jobs
        submitted = calls.read_text().split().count("sbatch")
        calls.write_text("")
        started = time.perf_counter()
        for _ in range(10):
            assert all(dispatcher.alive(refs))
        each_ms = (time.perf_counter() - started) * 100
        table.add_row(f"{jobs:,}", str(submitted), f"{len(calls.read_text().split()) / 10:g}", f"{each_ms:.0f}")
        dispatcher.cancel(refs)
        clear()
    return table


def make_sweep(path: Path, trials: int) -> None:
    """A sweep's folder in which a tenth of the trials is under way, half has ended and the rest is made."""
    folder = SweepFolder(path)
    folder.path.mkdir(parents=True)
    events: list[dict[str, Any]] = [
        {"event": "sweep", "sweep_id": "s", "question": "q", "metric": "eval/loss", "goal": "minimize"}
    ]
    for i in range(trials):
        name, params = f"run-{i}", {"orpo.learning_rate": 1e-4 * (i + 1), "orpo.beta": 0.1}
        events.append({"event": "trial", "index": i, "name": name, "run_id": f"{i:08}", "params": params, "unit": {}})
        if i % 10 < 6:
            job = {"kind": "resident", "worker": "w", "task": i, "job": {"kind": "slurm", "id": f"1_{i}"}}
            events.append({"event": "dispatch", "index": i, "attempt": 1, "job": job})
        if i % 10 < 5:
            facts = {"state": "completed", "metric": 0.5, "message": "", "seconds": 60.0, "given_up": False}
            events.append({"event": "end", "index": i, **facts})
        elif i % 10 == 5:
            trial = folder.trial(name)
            trial.path.mkdir(parents=True)
            status = {"attempt": 1, "state": "running", "step": 10, "max_steps": 100, "started": 1.0, "heartbeat": 2.0}
            trial.status.write_text(json.dumps(status))
    folder.journal.write_text("".join(json.dumps(event) + "\n" for event in events))


def status(trials: int, work: Path) -> Table:
    """The command as a user gives it, in a process of its own."""
    table = Table(title="isaerft-sweep status")
    for name in ("trials", "under way", "wall s", "processor s"):
        table.add_column(name, justify="right")
    make_sweep(work / "sweep", trials)
    command, took = [sys.executable, "-m", "isaerft_sweep.cli", "status", str(work / "sweep")], []
    before = processor_s()
    for _ in range(REPEATS):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        took.append(time.perf_counter() - started)
        assert f"{trials // 2} of {trials} ended" in done.stdout, done.stdout
    table.add_row(f"{trials:,}", f"{trials // 10:,}", f"{min(took):.2f}", f"{(processor_s() - before) / REPEATS:.2f}")
    return table


def main() -> None:
    """Print three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--trials", type=int, default=10_000)
    args = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    console, work = Console(width=120), Path(tempfile.mkdtemp(prefix="isaerft-bench-"))
    try:
        console.print(status(args.trials, work))
        with running_bed() as bed:
            os.environ.update(bed.environment)
            console.print(overhead(args.jobs, work))
            console.print(polling(work, bed.clear))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
