"""What is submitted, rendered and really run: the workers' script, and the templates in ``slurm/`` as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, processes_of
from helpers.served_sweeps import read_sweep, sweep_file, trial_id
from helpers.served_sweeps import stepping as running
from helpers.serving import Serving
from helpers.slurm_bed import Bed
from helpers.slurm_jobs import TEMPLATES, Note, sbatch
from helpers.sweeps import ended_states
from helpers.waiting import wait_for

from isaerft_sweep.dispatch.slurm.dispatcher import SlurmDispatcher
from isaerft_sweep.specs import LauncherSpec

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("paced")]
GOLDEN = Path(__file__).parent / "golden"


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


@pytest.mark.long
def test_an_array_of_made_trials(slurm: Bed, tmp_path: Path) -> None:
    """One element is preempted by hand: it is queued again and goes on."""
    sweep = tmp_path / "outputs" / "s"
    options = ("name=s", "sweep.method=random", "sweep.run_cap=2", "orpo.max_steps=100", f"output={tmp_path / 'outputs'}")
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


def test_an_array_of_made_trials_is_seen_and_ended(slurm: Bed, tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    options = ("name=s", "sweep.method=random", "sweep.run_cap=3", "orpo.max_steps=100000", f"output={tmp_path / 'outputs'}")
    assert cli("make", *TINY, *options, "tracker=disabled").returncode == 0
    other = sbatch(tmp_path, "--hold", "--array=0-2", str(TEMPLATES / "trials.sbatch"), "outputs/other")
    sbatch(tmp_path, "--array=0-2%1", str(TEMPLATES / "trials.sbatch"), "outputs/s")
    wait_for(lambda: list(sweep.glob("trials/*/metrics.jsonl")))
    status = cli("status", str(sweep)).stdout
    assert "0 of 3 ended" in status and "2 created, 1 running" in status, status
    ended = cli("cancel", str(sweep))
    assert ended.returncode == 0 and "is left running; 0 of 3 trials" in ended.stdout, ended.stderr
    assert {job.split("_")[0] for job in slurm.jobs()} == {other}, "another sweep's array stays"
    wait_for(lambda: not processes_of(tmp_path))
    slurm.command("scancel", other)


@pytest.mark.long
def test_an_array_of_agents(slurm: Bed, serving: Serving, tmp_path: Path) -> None:
    """The real ``wandb agent`` with a server of our own; one element is preempted: queued again, its trial goes on."""
    path = serving.sweep(sweep_file(tmp_path, (*TINY, "orpo.max_steps=80"), (0.1, 0.2)))
    job = sbatch(
        tmp_path, "--array=0-1", "--time=10", str(TEMPLATES / "agents.sbatch"), path, environment=serving.environment
    )
    runs = [trial_id(serving, path, index) for index in (0, 1)]
    wait_for(lambda: all(running(tmp_path, run, least=12) for run in runs))
    slurm.command("scancel", "--batch", "--signal=TERM", f"{job}_0")
    wait_for(lambda: [e for e in serving.journal(path) if e.get("state") == "stopped"])
    wait_for(lambda: slurm.jobs() == [], timeout_s=400)
    found = read_sweep(serving, path)
    assert found["state"] == "FINISHED" and set(found["runs"]) == set(runs)
    for run in found["runs"].values():
        assert run["state"] == "finished" and run["steps"] == list(range(run["steps"][0], 81))
    attempts = sorted(e["attempt"] for e in serving.journal(path) if e["event"] == "dispatch")
    assert attempts == [1, 1, 2], "one went on"
    assert slurm.command("sacct", "-X", "-n", "-o", "State", "-j", job).split() == ["COMPLETED"] * 2


@pytest.mark.parametrize("name", ["agents.sbatch", "controller.sbatch"])
def test_what_somebody_cancels_does_not_come_back(name: str, slurm: Bed, tmp_path: Path) -> None:
    """``wandb`` and ``python`` are stand-ins here: what matters is that the template does not queue itself again."""
    for program in ("wandb", "python"):
        file = tmp_path / "bin" / program
        file.parent.mkdir(exist_ok=True)
        file.write_text("#!/bin/bash\ntouch begun\nexec sleep 300\n")
        file.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    flags = ["--time=10", *(["--array=0"] if name == "agents.sbatch" else [])]
    job = sbatch(tmp_path, *flags, str(TEMPLATES / name), environment=environment)
    wait_for((tmp_path / "begun").exists)
    slurm.command("scancel", job)
    wait_for(lambda: slurm.jobs() == [], timeout_s=60)
    time.sleep(1)
    assert slurm.jobs() == []
    assert set(slurm.command("squeue", "-h", "-r", "-t", "all", "-o", "%T", "-j", job).split()) == {"CANCELLED"}


@pytest.mark.parametrize("name", ["agents.sbatch", "trials.sbatch", "controller.sbatch"])
def test_templates_are_valid(name: str, slurm: Bed, tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", str(TEMPLATES / name)], check=True)
    done = subprocess.run(
        ["sbatch", "--test-only", str(TEMPLATES / name), "x"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
