"""The README's three lines with the real ``wandb`` command and real trials, while agents, trials and the server are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import TINY, processes_of
from helpers.served_sweeps import read_sweep, stepping, sweep_file, trial_id
from helpers.serving import Serving
from helpers.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500), pytest.mark.usefixtures("paced")]
STEPS = 160

LONG = (
    *TINY,
    f"orpo.max_steps={STEPS}",
    "orpo.eval_fraction=0.05",
    "orpo.checkpoint_every_steps=10",
    "orpo.warmup_steps=0",
)
"""Long enough to be stopped in the middle: wandb asks every 15 s whether it should be."""


EARLY = "early_terminate: {type: hyperband, min_iter: 2, eta: 2}"


@pytest.mark.long
def test_a_sweep_survives_whatever_dies(serving: Serving, tmp_path: Path) -> None:
    path = serving.sweep(sweep_file(tmp_path, LONG, (0.1, 0.15, 1.0e-7, 0.2), EARLY))
    sweep_id = path.rpartition("/")[2]
    agents = [serving.agent(path, f"agent{i}") for i in range(2)]
    orphan, third = trial_id(serving, path, 0), trial_id(serving, path, 1)
    points = [e["params"]["orpo.learning_rate"] for e in serving.journal(path) if e["event"] == "trial"]
    assert points == [0.1, 0.15], "two agents at once, on different points"

    # an agent dies: its trial writes a checkpoint and ends, and the other agent goes on with it
    wait_for(lambda: stepping(tmp_path, orphan, least=18))  # it has been evaluated twice: the bad one can be compared
    victim = next(a for a in agents if orphan in run_ids_below(a.pid))
    victim.kill()
    victim.wait()
    survivor = next(a for a in agents if a is not victim)

    # a trial is killed with all its processes: nobody says so, and it is handed out again
    status = wait_for(lambda: stepping(tmp_path, third, least=12))
    kill_trial(survivor.pid, status["pid"])

    # a bad trial is stopped early, with a checkpoint to go on from
    bad = trial_id(serving, path, 2)
    wait_for(lambda: [e for e in serving.journal(path) if e["event"] == "end" and e["index"] == 2])
    assert list(tmp_path.glob(f"outputs/{sweep_id}/{bad}/trials/*/checkpoints/checkpoint-*/.complete"))

    # and the server dies too, while the killed trial runs again
    wait_for(lambda: [e for e in serving.journal(path) if e["event"] == "dispatch" and e["index"] == 1][1:])
    serving.kill()
    acknowledged = serving.journal(path)
    serving.start()
    assert serving.journal(path)[: len(acknowledged)] == acknowledged

    assert survivor.wait(800) == 0, (tmp_path / "agent0.out").read_text() + (tmp_path / "agent1.out").read_text()
    check_outcome(serving, path, orphan, bad, third)
    wait_for(lambda: not [p for p in processes_of(tmp_path) if p.pid != serving.process.pid], timeout_s=60)


def run_ids_below(pid: int) -> list[str]:
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            found.append(child.environ().get("WANDB_RUN_ID", ""))
        except psutil.Error:
            continue
    return found


def kill_trial(agent: int, worker: int) -> None:
    """-9 to launch and to its worker, as when a node is lost."""
    launch = [p for p in psutil.Process(agent).children(recursive=True) if "isaerft_sweep.launch" in " ".join(p.cmdline())]
    submitit = psutil.Process(worker).parent()
    for process in [*launch, *([submitit] if submitit is not None else []), psutil.Process(worker)]:
        os.kill(process.pid, signal.SIGKILL)


def check_outcome(serving: Serving, path: str, orphan: str, bad: str, third: str) -> None:
    entries, found = serving.journal(path), read_sweep(serving, path)
    assert found["state"] == "FINISHED" and found["expected"] == 4 and len(found["runs"]) == 4
    assert len({e["params"]["orpo.learning_rate"] for e in entries if e["event"] == "trial"}) == 4, "no point twice"
    runs = found["runs"]
    assert runs[orphan]["state"] == "finished" and runs[orphan]["steps"][-1] == STEPS
    assert runs[bad]["state"] == "killed" and runs[bad]["summary"]["state"] == "pruned"
    first_end = next(e for e in entries if e["event"] == "end" and e["index"] == 2)
    assert first_end["state"] == "pruned", first_end
    for index in (0, 1):
        attempts = [e["attempt"] for e in entries if e["event"] == "dispatch" and e["index"] == index]
        assert attempts[:2] == [1, 2], "the orphaned and the killed trial were handed out again"
    for run in runs.values():
        steps = run["steps"]
        assert steps == list(range(steps[0], steps[-1] + 1)), "every step once, none lost"
        assert run["state"] in ("finished", "killed")
        assert (
            run["name"].startswith("run-tiny-llama-lr") and run["group"] == path.rpartition("/")[2] and run["job"] == "trial"
        )
        assert "isaerft" in run["tags"] and not [key for key in run["config"] if "." in key]
        assert run["summary"]["state"] in ("completed", "pruned")
    finished = {name: run["summary"]["eval/nll_loss"] for name, run in runs.items() if run["state"] == "finished"}
    assert found["best"] in runs and min(finished.values()) >= runs[found["best"]]["summary"]["eval/nll_loss"]
    logged = [json.loads(line) for line in (serving.data / "server.jsonl").read_text().splitlines()]
    committed = {e["id"] for e in logged if e["event"] == "artifact" and e["facts"].get("state") == "COMMITTED"}
    assert len(committed) == len(finished)
    for artifact in committed:
        names = {p.name for p in (serving.data / "artifacts" / artifact / "files").iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    board = subprocess.run(
        [sys.executable, "-m", "isaerft_sweep.cli", "leaderboard", f"outputs/{path.rpartition('/')[2]}"],
        cwd=serving.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert board.returncode == 0 and "Leaderboard: eval/nll_loss, minimize" in board.stdout, board.stderr
