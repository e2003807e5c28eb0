"""A sweep read from W&B by the real ``wandb.Api``, against a stand-in of W&B's own API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.stand_ins import StandInWandb, served

from isaerft_sweep.cli import main
from isaerft_sweep.naming import run_id
from isaerft_sweep.results.from_wandb import RemoteSweep, RunData, ranked, read_wandb_sweep

CONFIG = """\
method: random
metric: {name: eval/rewards/margins, goal: maximize}
run_cap: 9
parameters:
  orpo.learning_rate: {distribution: log_uniform_values, min: 1.0e-6, max: 5.0e-5}
  orpo.beta: {values: [0.05, 0.1, 0.15, 0.2]}
"""


def run(i: int, state: str = "finished") -> dict[str, Any]:
    nested = {"orpo": {"value": {"learning_rate": (i + 1) * 1e-5, "beta": 0.05 * (i + 1)}}}
    summary = {"eval/rewards/margins": 0.1 * i, "eval/log_odds_chosen": -0.1 * i, "_runtime": 60, "_step": 4}
    return {
        "name": f"rid{i}",
        "displayName": f"run-gemma-2-2b-lr{i + 1}.0e-05-beta{0.05 * (i + 1):g}-20250228-222{i}",
        "state": state,
        "createdAt": f"2026-11-24T10:0{i}:00Z",
        "config": nested,
        "summaryMetrics": summary if state == "finished" else {},
    }


@pytest.fixture
def wandb_api(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInWandb]:
    runs = [run(0), run(1), run(2), run(3, "crashed")]
    runs[1]["summaryMetrics"] |= {"_runtime": 0.3, "seconds": 90.0}  # uploaded when the trial was over
    rows = {f"rid{i}": [{"_step": s, "_timestamp": 1.0 + s, "train/loss": 3.0 - s} for s in range(3)] for i in range(4)}
    stand_in = StandInWandb(CONFIG, runs, rows)
    with served(stand_in) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        yield stand_in


def test_leaderboard_and_best(wandb_api: StandInWandb, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", "wandb:e/p/abcd1234"]) == 0
    said = capsys.readouterr().out
    assert "eval/rewards/margins, maximize" in said and "contains beta itself" in said and "failed" in said
    assert "which has no scores of single pairs" in said, "why nothing is said of sureness"
    assert main(["best", "wandb:e/p/abcd1234", "--as", "overrides"]) == 0
    assert capsys.readouterr().out.strip() == "orpo.learning_rate=3.0000000000000004e-05 orpo.beta=0.15000000000000002"
    assert main(["best", "wandb:e/p/abcd1234", "--metric", "eval/log_odds_chosen", "--as", "overrides"]) == 0
    assert capsys.readouterr().out.strip() == "orpo.learning_rate=1e-05 orpo.beta=0.05"
    costs = [entry.device_s for entry in read_wandb_sweep("e/p/abcd1234").entries]
    assert sorted(costs) == [0, 60, 60, 90], "the runs' own time: what they shared is not known"
    assert main(["best", "wandb:e/p/abcd1234", "--as", "path"]) == 2
    assert "is in W&B, not on this machine" in capsys.readouterr().err


def test_report(
    wandb_api: StandInWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", "wandb:e/p/abcd1234"]) == 0
    page = tmp_path / "report-abcd1234" / "report.html"
    assert str(page.relative_to(tmp_path)) in capsys.readouterr().out
    text = page.read_text()
    assert "3 completed, 1 failed" in text and "train/loss" in text and "log_uniform_values from 1e-06 to 5e-05" in text
    assert "HistoryPage" in wandb_api.asked, "the curves are W&B's"
    assert main(["report", "wandb:e/p/abcd1234", "--generate"]) == 2
    assert "answers need a sweep in a folder" in capsys.readouterr().err


def test_trials_keep_their_numbers_however_they_were_uploaded(wandb_api: StandInWandb) -> None:
    for i, (index, state) in enumerate(((7, "finished"), (0, "finished"), (3, "crashed"))):
        wandb_api.runs[i]["name"], wandb_api.runs[i]["state"] = run_id("abcd1234", index), state
    numbers = {entry.record.run_id: entry.record.index for entry in read_wandb_sweep("e/p/abcd1234").entries}
    assert numbers == {**{run_id("abcd1234", index): index for index in (7, 0, 3)}, "rid3": 8}, "another's run comes behind"


def test_a_sweep_of_another_program_with_a_nested_aggregated_metric(wandb_api: StandInWandb) -> None:
    wandb_api.config = "{method: random, metric: {name: val.acc}, parameters: {net: {parameters: {kind: {values: [a, b]}}}}}"
    for i, best in enumerate((3.0, 1.0, 2.0)):
        wandb_api.runs[i]["summaryMetrics"] = {"val": {"acc": {"min": best, "max": 9.0}}, "eval/x": {"last": best}}
        wandb_api.runs[i]["config"] = {"net": {"value": {"kind": "ab"[i % 2]}}}
    read = read_wandb_sweep("e/p/abcd1234")
    assert (read.metric.name, read.metric.goal) == ("val.acc", "minimize"), "W&B's own default"
    ranked = [(e.record.index, e.metrics["val.acc"], e.metrics["eval/x"], e.params) for e in read.entries if e.rank]
    assert ranked == [(1, 1.0, 1.0, {"net.kind": "b"}), (2, 2.0, 2.0, {"net.kind": "a"}), (0, 3.0, 3.0, {"net.kind": "a"})]


@pytest.mark.parametrize("name", ["wandb:e/p/nothere1", "wandb:abcd1234", "wandb:a/b/c/d"])
def test_a_sweep_that_is_not_there(name: str, wandb_api: StandInWandb, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", name]) == 2
    said = capsys.readouterr().err
    assert name.removeprefix("wandb:") in said and "Traceback" not in said


@pytest.mark.slow
def test_w_and_b_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "2")
    assert main(["leaderboard", "wandb:e/p/abcd1234"]) == 2
    said = capsys.readouterr().err
    assert "could not be read from http://127.0.0.1:9" in said and "use the sweep's folder instead" in said


def test_constraints_and_goals_rank_the_runs_of_wandb_too() -> None:
    config = {
        "method": "random",
        "metric": {"name": "val/acc", "goal": "maximize"},
        "constraints": {"val/cost": {"at_most": 3}},
        "parameters": {"lr": {"min": 0.0, "max": 1.0}},
    }
    runs = [
        RunData(f"r{i}", f"r{i}", "finished", f"{i}", {"lr": 0.1 * i}, {"val/acc": acc, "val/cost": cost})
        for i, (acc, cost) in enumerate([(0.9, 4.0), (0.5, 2.0), (0.7, 3.0)])
    ]
    read = ranked(RemoteSweep("wandb:e/p/s", "s", config, runs, lambda _: []))
    assert [(e.record.run_id, e.violation > 0) for e in read.entries] == [("r2", False), ("r1", False), ("r0", True)]
    goals = {**config, "metrics": [{"name": "val/acc", "goal": "maximize"}, {"name": "val/cost", "goal": "minimize"}]}
    del goals["constraints"], goals["metric"]
    by_goals = ranked(RemoteSweep("wandb:e/p/s", "s", goals, runs, lambda _: []), prefer={"val/cost": 100.0})
    assert by_goals.entries[0].record.run_id == "r1" and all(entry.on_front for entry in by_goals.entries)
