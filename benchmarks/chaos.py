"""Sweeps whose controllers, workers and nodes are killed all the time: is a trial lost, doubled, or other than it should be?

    python benchmarks/chaos.py [--minutes 12] [--launcher local|slurm] [--seed 0]

One sweep of a tiny model after the other, by the real command, which is given again whenever its controller has gone. Every
few seconds something is ended: the controller or a worker, with -9 or with SIGTERM; on SLURM (the tests' own one, see
``tests/helpers/slurm_bed.py``) also a node, slurmctld, or a job by scancel. When the time is over the last sweep is left in
peace until it ends. Then every point is run once more, alone and undisturbed. The last line counts:

    lost       trials that a sweep should have and that have not completed
    doubled    trials that completed twice, or have a step twice
    unequal    trials whose steps' metrics or whose adapter differ, in the last bit, from those of the undisturbed run

The exit code is 1 when any of them is not 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from isaerft_sweep.controller.monitor import SweepMonitor
from isaerft_sweep.dispatch.job import importing
from isaerft_sweep.journal.layout import SweepFolder, TrialFolder
from isaerft_sweep.journal.states import TrialState

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.slurm_bed import Bed, running_bed, why_not

TRIALS, STEPS, SLOTS = 8, 30, 3
OPTIONS = (
    "model=tiny", "data.train_size=24", "data.eval_size=8", f"orpo.max_steps={STEPS}", "orpo.max_length=300",
    "orpo.checkpoint_every_steps=5", "orpo.eval_fraction=0.5", "launcher.poll_s=0.3", "launcher.threads=1",
    f"launcher.slots={SLOTS}", "launcher.max_retries=10000", "launcher.max_failures=10000", "sweep=reference-bayes",
    "sweep.method=random", f"sweep.run_cap={TRIALS}", "tracker=disabled",
)  # fmt: skip
PEACE_S = 600.0
"""How long the last sweep may take once nothing is killed any more."""
SELDOM = 0.15
LOST_NODES = 2
"""How many of the four nodes may be away at a time."""
PACE = """
import builtins, time

said = builtins.print

def print_and_wait(*args, **kwargs):
    said(*args, **kwargs)
    if args and str(args[0]).startswith("step "):
        time.sleep(0.2)

builtins.print = print_and_wait
"""
"""Stands in for a larger model: every step takes a while, and no processor time."""


class Chaos:
    """Ends parts of the sweeps below ``work``."""

    def __init__(self, work: Path, bed: Bed | None, seed: int) -> None:
        self.work, self.bed, self.random = work, bed, random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.back: dict[str, float] = {}
        """When daemons that were killed are started again."""

    def disturb(self, controller: subprocess.Popen[bytes], folder: SweepFolder) -> None:
        """End something, chosen at random among what there is; seldom while no trial runs, so that some get somewhere."""
        if not working(folder) and self.random.random() > SELDOM:
            return
        ways: dict[str, Callable[[], bool]] = {
            "controller -9": lambda: end(controller.pid, signal.SIGKILL),
            "controller -TERM": lambda: end(controller.pid, signal.SIGTERM),
            "worker -9": lambda: self._end_worker(folder, signal.SIGKILL),
            "worker -TERM": lambda: self._end_worker(folder, signal.SIGTERM),
        }
        if self.bed is not None:
            ways |= {"node lost": self._lose_node, "slurmctld -9": self._lose_controller, "scancel": self._scancel}
        # most of all workers: whatever else goes keeps them from getting anywhere for a while
        left = [name for name in sorted(ways) for _ in range(3 if name.startswith("worker") else 1)]
        while left:
            name = self.random.choice(left)
            if ways[name]():
                self.kills[name] += 1
                return
            left = [other for other in left if other != name]

    def mend(self, at_once: bool = False) -> None:
        """Start again what has been away for long enough, or everything."""
        assert self.bed is not None
        for name in [name for name, when in self.back.items() if at_once or time.monotonic() > when]:
            del self.back[name]
            if name == "slurmctld":
                self.bed.start_controller()
            else:
                self.bed.start_node(int(name[1:]))

    def _end_worker(self, folder: SweepFolder, number: int) -> bool:
        pids = working(folder)
        return bool(pids) and end(self.random.choice(pids), number)

    def _lose_node(self) -> bool:
        assert self.bed is not None
        there = [name for name in self.bed.daemons if name[1:].isdecimal()]
        if len(self.back) >= LOST_NODES or not there:
            return False
        self._lose(self.random.choice(there), self.random.uniform(5, 40))
        return True

    def _lose_controller(self) -> bool:
        if "slurmctld" in self.back:
            return False
        self._lose("slurmctld", self.random.uniform(1, 8))
        return True

    def _lose(self, name: str, for_s: float) -> None:
        assert self.bed is not None
        self.bed.kill(name)
        self.back[name] = time.monotonic() + for_s

    def _scancel(self) -> bool:
        assert self.bed is not None
        try:
            jobs = self.bed.jobs()
            return bool(jobs) and self.bed.command("scancel", self.random.choice(jobs)) == ""
        except subprocess.SubprocessError:  # slurmctld is away, or the job has ended
            return False


def end(pid: int, number: int) -> bool:
    """Send a signal; whether there was somebody to get it."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def working(folder: SweepFolder) -> list[int]:
    """The processes that run the sweep's trials now."""
    said = [TrialFolder(path).read_status() for path in folder.path.glob("trials/*")]
    return sorted({s["pid"] for s in said if s.get("state") == TrialState.RUNNING and psutil.pid_exists(s["pid"])})


def run_disturbed(chaos: Chaos, folder: SweepFolder, launcher: str, deadline: float) -> None:
    """One sweep, by the same command as often as it takes; with kills until the deadline, then in peace."""
    command = [sys.executable, "-m", "isaerft_sweep.launch", *OPTIONS, f"launcher={launcher}"]
    command += [f"output={folder.path.parent}", f"name={folder.path.name}", f"sweep.seed={chaos.random.randrange(10**6)}"]
    with (folder.path.parent / f"{folder.path.name}.log").open("ab") as log:
        while time.monotonic() < deadline + PEACE_S:
            controller = subprocess.Popen(command, cwd=chaos.work, stdout=log, stderr=log)
            try:
                while controller.poll() is None and time.monotonic() < deadline + PEACE_S:
                    wait(controller, chaos.random.uniform(2, 8))
                    if chaos.bed is not None:
                        chaos.mend(at_once=time.monotonic() > deadline)
                    if time.monotonic() < deadline and controller.poll() is None:
                        chaos.disturb(controller, folder)
            finally:
                if controller.poll() is None:
                    controller.kill()
                code = controller.wait()
            if code == 0:
                return
            time.sleep(0.5)


def wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until the process ends, at most so long."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def judge(folder: SweepFolder, alone: Path) -> Counter[str]:
    """How many of a sweep's trials are lost, doubled and unequal."""
    seen, found = SweepMonitor(folder.path), Counter(trials=TRIALS)
    found["lost"] = TRIALS - sum(record.state == TrialState.COMPLETED for record in seen.records)
    lines = [json.loads(line) for line in folder.journal.read_text(encoding="utf-8").splitlines()]
    ends = Counter(line["index"] for line in lines if line["event"] == "end" and line["state"] == TrialState.COMPLETED)
    for record in seen.records:
        if record.state != TrialState.COMPLETED:
            continue
        trial = folder.trial(record.name)
        steps = [row["step"] for row in trial.read_metrics() if "train/loss" in row]
        found["doubled"] += ends[record.index] > 1 or len(set(steps)) < len(steps)
        found["unequal"] += result(trial) != result(run_alone(trial, alone / folder.path.name / record.name))
    return found


def run_alone(trial: TrialFolder, place: Path) -> TrialFolder:
    """The same trial, run from beginning to end in this process."""
    with importing():
        from isaerft_sweep.trial.runner import run_trial

    whole = TrialFolder(place)
    whole.create(trial.read_spec())
    whole.begin_attempt(1)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        run_trial(whole, 1)
    return whole


def result(trial: TrialFolder) -> tuple[list[dict[str, Any]], bytes]:
    """All that a trial has measured, without the time of day, and what it has learned."""
    rows = [{key: value for key, value in row.items() if key != "time"} for row in trial.read_metrics()]
    return rows, (trial.adapter / "adapter_model.safetensors").read_bytes()


def run(chaos: Chaos, launcher: str, minutes: float) -> Counter[str]:
    """Sweeps until the time is over; what became of their trials."""
    deadline, found, number = time.monotonic() + 60 * minutes, Counter[str](), 0
    folders = []
    while time.monotonic() < deadline:
        folders.append(SweepFolder(chaos.work / "outputs" / f"chaos-{number}"))
        folders[-1].path.parent.mkdir(exist_ok=True)
        run_disturbed(chaos, folders[-1], launcher, deadline)
        print(f"sweep {number}: {sum(chaos.kills.values())} kills so far", flush=True)
        number += 1
    for folder in folders:
        found += judge(folder, chaos.work / "alone")
    found["sweeps"] = number
    return found


def prepare(work: Path) -> None:
    """The environment of all that is started, and of this process's own trials."""
    (work / "pace").mkdir()
    (work / "pace" / "sitecustomize.py").write_text(PACE, encoding="utf-8")
    here = str(Path(__file__).parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(work / "pace"), here, os.environ.get("PYTHONPATH", "")])
    os.environ["ISAERFT_CACHE"] = str(work / "cache")
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", WANDB_SILENT="true")


def end_all(work: Path) -> None:
    """Nothing that was started below ``work`` is left."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(work) in part for part in process.cmdline()):
                process.kill()


def main() -> None:
    """Print one line, and exit with 1 when a trial is lost, doubled or unequal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed, and when")
    args = parser.parse_args()
    if args.launcher == "slurm" and (reason := why_not()):
        sys.exit(reason)
    work = Path(tempfile.mkdtemp(prefix="isaerft-chaos-"))
    try:
        prepare(work)
        with contextlib.ExitStack() as stack:
            bed = stack.enter_context(running_bed()) if args.launcher == "slurm" else None
            os.environ.update(bed.environment if bed else {})
            chaos = Chaos(work, bed, args.seed)
            found = run(chaos, args.launcher, args.minutes)
    finally:
        end_all(work)
        shutil.rmtree(work, ignore_errors=True)
    kills = ", ".join(f"{name} {count}" for name, count in sorted(chaos.kills.items()))
    print(
        f"chaos on {args.launcher}, {args.minutes:g} min: {found['trials']} trials in {found['sweeps']} sweeps, "
        f"{sum(chaos.kills.values())} kills ({kills}); {found['lost']} lost, {found['doubled']} doubled, "
        f"{found['unequal']} unequal"
    )
    sys.exit(1 if found["lost"] or found["doubled"] or found["unequal"] else 0)


if __name__ == "__main__":
    main()
