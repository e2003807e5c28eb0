"""Whole sweeps through the real command: launch, follow, stop, kill, go on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from conftest import TINY, events, launch_command, processes_of
from helpers.sweeps import check_wandb_runs, ended_states, start, statuses, stepping
from helpers.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("paced")]
SWEEP = (*TINY, "name=s", "sweep.run_cap=3")
LONG = (*TINY, "name=s", "sweep.run_cap=2", "orpo.max_steps=100000", "tracker=disabled")


@pytest.mark.long
def test_a_sweep_from_start_to_leaderboard(launch, tmp_path: Path) -> None:
    done = launch(*SWEEP)
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / "outputs" / "s"
    assert "Leaderboard: eval/log_odds_chosen" in done.stdout and "untrained" in done.stdout
    assert "isaerft-sweep generate outputs/s/trials/run-tiny-llama-lr" in done.stdout.replace("\n", "")
    names = [e["name"] for e in events(sweep) if e["event"] == "trial"]
    assert sorted(p.name for p in (sweep / "trials").iterdir()) == sorted(names) and len(names) == 3
    for name in names:
        assert {"spec.json", "status.json", "metrics.jsonl", "adapter", "README.md", "wandb"} <= {
            p.name for p in (sweep / "trials" / name).iterdir()
        }
    ranked = list(csv.DictReader((sweep / "leaderboard.csv").read_text().splitlines()))
    scores = [float(row["eval/log_odds_chosen"]) for row in ranked]
    assert scores == sorted(scores, reverse=True) and [row["rank"] for row in ranked] == ["1", "2", "3"]
    assert {"sweep.yaml", "config.yaml", "environment.json"} <= {p.name for p in sweep.iterdir()}
    check_wandb_runs(sweep)

    before = events(sweep)
    again = launch(*SWEEP)
    assert again.returncode == 0 and "3 already ended" in again.stdout and events(sweep) == before
    more = launch(*SWEEP, "sweep.run_cap=4")
    assert more.returncode == 0 and ended_states(sweep) == {"completed": 4}, "a larger cap adds trials to the same sweep"

    path = subprocess.run(
        ["isaerft-sweep", "best", str(sweep), "--as", "path"], capture_output=True, text=True, check=True, env=venv_path()
    )
    generated = subprocess.run(
        ["isaerft-sweep", "leaderboard", str(sweep)], capture_output=True, text=True, check=True, env=venv_path()
    )
    assert Path(path.stdout.strip()).is_dir()
    assert "Best trial" in generated.stdout
    cards = [p.read_text() for p in sweep.glob("trials/*/adapter/README.md")]
    assert len(cards) == 4 and all("of 4 completed trials" in card for card in cards)
    assert not [card for card in cards if "| eval/log_odds_chosen |  |" in card], "untrained values are every trial's"

    command = [
        "isaerft-sweep",
        "report",
        str(sweep),
        "--generate",
        "--prompt",
        "Where is my order?",
        "--max-new-tokens",
        "5",
    ]
    report = subprocess.run(command, capture_output=True, text=True, check=False, env=venv_path())
    assert report.returncode == 0, report.stderr
    page = (sweep / "report.html").read_text()
    samples = json.loads((sweep / "samples.json").read_text())
    assert [c.split(" by ")[0] for c in samples["columns"]] == ["untrained", "best", "worst"]
    assert len(samples["prompts"][0]["answers"]) == 3 and "Where is my order?" in page and "What was learned" in page


def venv_path() -> dict[str, str]:
    import sys

    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.long
def test_ctrl_c_leaves_nothing_running_and_the_same_command_goes_on(number: int, tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    controller = start(tmp_path, *LONG)
    wait_for(lambda: stepping(sweep))
    controller.send_signal(number)
    assert controller.wait(90) == 130
    assert processes_of(tmp_path) == []
    assert ended_states(sweep) == {"stopped": 1}
    reached = statuses(sweep)[0]["step"]
    assert list(sweep.glob("trials/*/checkpoints/checkpoint-*/.complete"))
    assert "nothing is left running" in (tmp_path / "controller.out").read_text()

    controller = start(tmp_path, *LONG)
    wait_for(lambda: [s for s in stepping(sweep) if s["attempt"] == 2 and s["step"] > reached])
    assert len([e for e in events(sweep) if e["event"] == "trial"]) == 1, "the stopped trial goes on; no new one is made"
    controller.send_signal(number)
    assert controller.wait(90) == 130 and processes_of(tmp_path) == []


def test_ctrl_c_while_a_controller_is_sent_to_the_background_ends_it(tmp_path: Path) -> None:
    leaving = start(tmp_path, *LONG, "--detach")
    wait_for((tmp_path / "outputs" / "s" / "controller.log").exists)
    leaving.send_signal(signal.SIGINT)
    assert leaving.wait(120) == 130, (tmp_path / "controller.out").read_text()
    assert "the controller has ended" in (tmp_path / "controller.out").read_text()
    wait_for(lambda: processes_of(tmp_path, started_there=True) == [], timeout_s=60)


@pytest.mark.long
def test_kill_9_of_the_controller_loses_and_repeats_nothing(tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    options = (*TINY, "name=s", "sweep.run_cap=3", "orpo.max_steps=24", "tracker=disabled")
    controller = start(tmp_path, *options)
    wait_for(lambda: (sweep / "journal.jsonl").exists() and ended_states(sweep)["completed"] == 1)
    wait_for(lambda: stepping(sweep))
    controller.kill()
    controller.wait()
    assert [p for p in processes_of(tmp_path) if "submitit" in " ".join(p.cmdline())], "the worker lives on as an orphan"
    assert (
        subprocess.run(launch_command(*options), cwd=tmp_path, capture_output=True, check=False, timeout=300).returncode == 0
    )
    dispatched = Counter(e["index"] for e in events(sweep) if e["event"] == "dispatch")
    assert dispatched == {0: 1, 1: 1, 2: 1}, "the orphan was adopted, not run again"
    assert ended_states(sweep) == {"completed": 3} and processes_of(tmp_path) == []


@pytest.mark.long
def test_kill_9_of_a_worker_is_noticed_and_retried(tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    options = (*TINY, "name=s", "sweep.run_cap=1", "orpo.max_steps=40", "orpo.checkpoint_every_steps=5", "tracker=disabled")
    controller = start(tmp_path, *options)
    victim = wait_for(lambda: [s for s in stepping(sweep) if s["step"] > 10])[0]
    os.kill(victim["pid"], signal.SIGKILL)
    assert controller.wait(400) == 0
    ends = [e for e in events(sweep) if e["event"] == "end"]
    assert [e["state"] for e in ends] == ["failed", "completed"]
    assert "ended without a word" in ends[0]["message"] and "step" in ends[0]["message"], "with the log's last lines"
    rows = [json.loads(line) for line in next(sweep.glob("trials/*/metrics.jsonl")).read_text().splitlines()]
    assert [r["step"] for r in rows if "train/loss" in r] == list(range(1, 41)), "every step once, none lost"


@pytest.mark.long
def test_a_worker_that_always_dies_is_given_up_with_the_reason(tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    options = (*TINY, "name=s", "sweep.run_cap=1", "orpo.max_steps=100000", "launcher.max_retries=1", "tracker=disabled")
    controller = start(tmp_path, *options)
    for attempt in (1, 2):
        victim = wait_for(lambda n=attempt: [s for s in stepping(sweep) if s["attempt"] == n])[0]
        os.kill(victim["pid"], signal.SIGKILL)
    assert controller.wait(120) == 1
    ends = [e for e in events(sweep) if e["event"] == "end"]
    assert [e["given_up"] for e in ends] == [False, True]
    again = start(tmp_path, *options)
    wait_for(lambda: [s for s in stepping(sweep) if s["attempt"] == 3])
    again.send_signal(signal.SIGINT)
    assert again.wait(90) == 130, "the same command tries a failed trial again: its cause may have been mended"
    said = (tmp_path / "controller.out").read_text()
    assert "No winner: no trial has completed yet" in said and said.count("ended without a word") == 2


def test_one_diverged_trial_does_not_end_the_sweep(launch, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "method: grid\nmetric: {name: eval/nll_loss, goal: minimize}\n"
        "parameters: {orpo.learning_rate: {values: [0.01, 1.0e+6, 0.02]}}\n"
    )
    done = launch(
        *TINY, "name=s", "sweep=none", f"sweep.file={file}", "model.dtype=float16", "orpo.warmup_steps=0", "tracker=disabled"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ended_states(tmp_path / "outputs" / "s") == {"completed": 2, "diverged": 1}


def test_two_trials_at_a_time(launch, tmp_path: Path) -> None:
    done = launch(*TINY, "name=s", "sweep.run_cap=4", "launcher.slots=2", "tracker=disabled")
    assert done.returncode == 0
    running = most = 0
    for event in events(tmp_path / "outputs" / "s"):
        running += {"dispatch": 1, "end": -1}.get(event["event"], 0)
        most = max(most, running)
    assert most == 2


@pytest.mark.long
def test_multirun_runs_one_sweep_after_the_other(launch, tmp_path: Path) -> None:
    """One that cannot begin does not keep the others from running."""
    done = launch("--multirun", *TINY, "sweep.run_cap=1", "adapter=bias,linear,scale", "adapter.l1=0.5", "tracker=disabled")
    assert done.returncode == 2 and "adapter.l1 and adapter.top_k must go with" in done.stderr, done.stderr
    folders = sorted(p.name for p in (tmp_path / "outputs").iterdir() if not p.name.startswith("."))
    assert len(folders) == 2 and "-bias-" in folders[0] and "-scale-" in folders[1]


@pytest.mark.long
def test_the_published_experiments_code_path_on_a_tiny_gemma_2(launch, tmp_path: Path) -> None:
    """`model=gemma-2-2b data=ultrafeedback adapter=bias sweep=reference`, with what cannot be had here swapped by overrides."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({"chosen": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Gladly."}],
                        "rejected": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "No."}]}) + "\n"
            for i in range(40)
        )
    )  # fmt: skip
    done = launch(
        "model=gemma-2-2b", "data=ultrafeedback", "adapter=bias", "sweep=reference", "name=s", "sweep.run_cap=2",
        "model.source=random", "model.architecture=gemma2", "data.source=files", f"data.path={pairs}", "data.eval_size=8",
        "adapter.sites=[{layer: 2, sae_release: isaerft-sweep, sae_id: random-64x256}]", "tracker=disabled",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "contains beta itself" in done.stdout.replace("\n", " ")
    spec = json.loads(next((tmp_path / "outputs" / "s").glob("trials/*/spec.json")).read_text())
    assert spec["name"].startswith("run-gemma-2-2b-lr") and spec["model_name"].startswith("GEMMA-2-2B-FT-ORPO-ISAERFT_run-")
    assert spec["tags"][:4] == ["generated_from_trainer", "smol-course", "module_1", "isaerft"]
