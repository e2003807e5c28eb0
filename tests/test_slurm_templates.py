"""What is submitted, rendered and really run: the workers' script, and the templates in ``slurm/`` as they are."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY
from slurm_bed import Bed
from test_slurm_dispatch import Note
from test_sweep import ended_states, wait_for

from isaerft_sweep.dispatch.slurm import SlurmDispatcher
from isaerft_sweep.specs import LauncherSpec

pytestmark = pytest.mark.slow
TEMPLATES = Path(__file__).parent.parent / "slurm"
GOLDEN = Path(__file__).parent / "golden"


def sbatch(cwd: Path, *arguments: str, path: Path | None = None) -> str:
    """Submit as a user does, from ``cwd``; the job's id."""
    first = [str(path)] if path else []
    environment = {**os.environ, "PATH": ":".join([*first, str(Path(sys.executable).parent), os.environ["PATH"]])}
    command = ["sbatch", "--parsable", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isaerft_sweep.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_workers_script(slurm: Bed, tmp_path: Path) -> None:
    flags = {"partition": "main", "array_parallelism": 2, "setup": ["module load cuda || true"]}
    dispatcher = SlurmDispatcher(LauncherSpec(kind="slurm", slots=3, slurm=flags), tmp_path / "s" / "jobs")
    refs = dispatcher.submit_all([Note(str(tmp_path / f"mark{i}")) for i in range(3)])  # type: ignore[arg-type]
    text = next((tmp_path / "s" / "jobs").glob("*_submission.sh")).read_text()
    text = text.replace(str(tmp_path / "s"), "FOLDER").replace(dispatcher.name, "NAME").replace(sys.executable, "PYTHON")
    assert re.sub(r"code/[0-9a-f]{16}", "code/DIGEST", text).strip() == (GOLDEN / "workers.sbatch").read_text().strip()
    wait_for(lambda: not any(dispatcher.alive(refs)))
    assert len(list(tmp_path.glob("mark*"))) == 3, "and it runs"


def test_an_array_of_made_trials(slurm: Bed, tmp_path: Path) -> None:
    """One element is preempted by hand: it is queued again and goes on."""
    sweep = tmp_path / "outputs" / "s"
    options = ("name=s", "sweep.method=random", "sweep.run_cap=2", "orpo.max_steps=400", f"output={tmp_path / 'outputs'}")
    refused = cli("make", *TINY, "name=t", f"output={tmp_path / 'outputs'}", "sweep.run_cap=2")
    assert refused.returncode == 2 and "only when none depends on another's result" in refused.stderr
    made = cli("make", *TINY, *options, "tracker=disabled")
    assert made.returncode == 0 and re.search(r"sbatch --array=0-1%8 \S*slurm/trials.sbatch", made.stdout), made.stderr
    job = sbatch(tmp_path, "--array=0-1%4", str(TEMPLATES / "trials.sbatch"), "outputs/s")
    wait_for(lambda: len(list(sweep.glob("trials/*/metrics.jsonl"))) == 2)
    early = cli("attach", str(sweep))
    assert early.returncode == 2 and "which no controller started" in early.stderr, early.stdout
    slurm.command("scancel", "--signal=USR1", f"{job}_1")
    wait_for(lambda: "stopped" in (tmp_path / f"isaerft-trial-{job}_1.out").read_text())
    wait_for(lambda: slurm.jobs() == [])
    assert (tmp_path / f"isaerft-trial-{job}_1.out").read_text().splitlines()[-1].endswith("completed")
    done = cli("attach", str(sweep))
    assert done.returncode == 0 and ended_states(sweep) == {"completed": 2} and "Leaderboard" in done.stdout, done.stderr


STAND_IN_AGENT = """#!/bin/bash
# Stands in for the real `wandb`, which needs a server: starts one "trial" as the agent does, and ends when that has ended.
echo "$*" >>CALLS
(trap 'echo checkpoint >>CALLS; exit' TERM; echo running >>CALLS; for _ in $(seq 600); do sleep 0.1; done) &
trap : INT
trial=$!
while kill -0 "$trial" 2>/dev/null; do wait "$trial"; done
"""


def test_an_array_of_agents(slurm: Bed, tmp_path: Path) -> None:
    """Up to W&B's own command, which a stand-in takes the place of."""
    calls, program = tmp_path / "calls", tmp_path / "bin" / "wandb"
    program.parent.mkdir()
    program.write_text(STAND_IN_AGENT.replace("CALLS", str(calls)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    agents = str(TEMPLATES / "agents.sbatch")
    job = sbatch(tmp_path, "--array=0-1", "--time=10", agents, "me/project/abcd1234", "--count", "2", path=program.parent)
    lines: Callable[[], list[str]] = lambda: calls.read_text().splitlines() if calls.exists() else []  # noqa: E731
    wait_for(lambda: lines().count("running") == 2)
    assert lines().count("agent me/project/abcd1234 --count 2") == 2
    slurm.command("scancel", "--batch", "--signal=TERM", f"{job}_0")
    wait_for(lambda: lines().count("checkpoint") == 1)
    wait_for(lambda: lines().count("running") == 3)
    assert slurm.command("squeue", "-h", "-r", "-o", "%i", "-t", "RUNNING").split() == [f"{job}_0", f"{job}_1"]


@pytest.mark.parametrize("name", ["agents.sbatch", "trials.sbatch", "controller.sbatch"])
def test_templates_are_valid(name: str, slurm: Bed, tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", str(TEMPLATES / name)], check=True)
    done = subprocess.run(
        ["sbatch", "--test-only", str(TEMPLATES / name), "x"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
