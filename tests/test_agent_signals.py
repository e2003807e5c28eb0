"""Real agents, told to end in every way: the trial checkpoints, nothing is left behind, the run says the truth."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, processes_of
from helpers.served_sweeps import read_sweep, stepping, sweep_file, trial_id
from helpers.serving import Serving
from helpers.slurm_bed import Bed
from helpers.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("paced")]
OPTIONS = (*TINY, "orpo.checkpoint_every_steps=10", "orpo.eval_fraction=0.2")
PLACES: dict[str, tuple[str, ...]] = {"local": (), "slurm": ("launcher=slurm", "launcher.poll_s=0.3")}


def begin(
    serving: Serving, tmp_path: Path, steps: int, place: str, *flags: str
) -> tuple[str, str, subprocess.Popen[str], int]:
    """A sweep of one trial that an agent is at: the sweep's path, the run, the agent, the step reached."""
    path = serving.sweep(sweep_file(tmp_path, (*OPTIONS, *PLACES[place], f"orpo.max_steps={steps}"), (0.1,)))
    agent = serving.agent(path, "first", *flags)
    run = trial_id(serving, path, 0)
    return path, run, agent, int(wait_for(lambda: stepping(tmp_path, run, least=12))["step"])


def check_nothing_left(serving: Serving, tmp_path: Path, agent: subprocess.Popen[str], run: str) -> None:
    agent.wait(150)
    assert serving.process is not None
    wait_for(lambda: [p.pid for p in processes_of(tmp_path)] in ([], [serving.process.pid]), timeout_s=60)
    assert list(tmp_path.glob(f"outputs/*/{run}/trials/*/checkpoints/checkpoint-*/.complete"))


def outcome(serving: Serving, path: str, run: str) -> dict[str, Any]:
    found: dict[str, Any] = read_sweep(serving, path)["runs"]
    assert set(found) == {run}, "one trial, one run"
    return dict(found[run])


def preempted(tmp_path: Path, run: str, reached: int) -> dict[str, Any] | None:
    """The status of the run's second attempt, once that has got further than the first."""
    status = stepping(tmp_path, run, least=reached + 1)
    return status if status and status["attempt"] == 2 else None


@pytest.mark.parametrize(("place", "way"), [("local", "terminated"), ("local", "ctrl-c twice"), ("slurm", "forwarded")])
@pytest.mark.long
def test_an_agent_that_is_told_to_end(
    place: str, way: str, serving: Serving, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Its trial checkpoints and is preempted; the next agent goes on with it, in the same run."""
    bed: Bed | None = request.getfixturevalue("slurm") if place == "slurm" else None
    path, run, agent, reached = begin(serving, tmp_path, 100, place, *(["--forward-signals"] if way == "forwarded" else []))
    if bed is not None:  # its launch submits a new job by itself, for the same run
        bed.command("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        reached = int(wait_for(lambda: preempted(tmp_path, run, reached))["step"])
    if way in ("forwarded", "terminated"):
        agent.terminate()  # without --forward-signals wandb's agent ends at once and says nothing to its trial
    else:
        agent.send_signal(signal.SIGINT)
        wait_for(lambda: "Waiting for runs to end" in (tmp_path / "first.out").read_text(), timeout_s=60)
        agent.send_signal(signal.SIGINT)
    check_nothing_left(serving, tmp_path, agent, run)
    assert bed is None or bed.jobs() == []
    cut = outcome(serving, path, run)
    assert cut["state"] == "preempted" and reached <= cut["steps"][-1] < 100
    assert serving.agent(path, "second").wait(200) == 0, (tmp_path / "second.out").read_text()
    whole = outcome(serving, path, run)
    assert whole["state"] == "finished" and whole["steps"] == list(range(whole["steps"][0], 101)), "every step once"
    assert whole["name"] == cut["name"]
    attempts = [(e["event"], e.get("attempt"), e.get("state")) for e in serving.journal(path) if e["event"] != "trial"]
    assert attempts[1:] == [
        ("dispatch", 1, None),
        ("end", None, "stopped"),
        ("dispatch", 2, None),
        ("end", None, "completed"),
    ]


CANCEL = ("wandb", "sweep", "--cancel")
BUTTON = (
    sys.executable,
    "-c",
    "import sys, wandb; wandb.Api().run('/'.join(sys.argv[1].split('/')[:2] + sys.argv[2:])).stop()",
)


@pytest.mark.parametrize("command", [CANCEL, BUTTON], ids=["cancel", "stop button"])
@pytest.mark.long
def test_a_run_that_is_stopped_for_good(command: tuple[str, ...], serving: Serving, tmp_path: Path) -> None:
    path, run, agent, _ = begin(serving, tmp_path, 100_000, "local")
    done = serving.run(*command, path, *([run] if command is BUTTON else []))
    assert done.returncode == 0, done.stderr
    check_nothing_left(serving, tmp_path, agent, run)
    assert outcome(serving, path, run)["state"] == "killed"
    ends = [e for e in serving.journal(path) if e["event"] == "end"]
    assert [(e["state"], e["given_up"]) for e in ends] == [("stopped", True)]
