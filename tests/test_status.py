"""What status, logs and the leaderboard say of a sweep in every condition that it can be in."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.sweeps import ended, made
from rich.console import Console

from isaerft_sweep.cli import main
from isaerft_sweep.controller.controller_info import write_controller_info
from isaerft_sweep.controller.sweep_status import show_status
from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.atomic_files import write_json
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.results.reading import read_sweep_folder


def dispatched(journal: Journal, index: int, job: dict[str, Any], **status: Any) -> None:
    journal.write("dispatch", index=index, attempt=1, job=job)
    if status:
        facts = {
            "attempt": 1,
            "state": "running",
            "host": "node7",
            "pid": 1,
            "started": time.time(),
            "heartbeat": time.time(),
        }
        write_json(journal.folder.trial(f"run-{index}").status, {**facts, **status})


def status(path: Path, width: int = 200) -> str:
    out = io.StringIO()
    show_status(Console(file=out, width=width, soft_wrap=True), path)
    return out.getvalue()


SLURM = {"kind": "resident", "worker": "w", "task": 1, "job": {"kind": "slurm", "id": "4711_2"}}


def test_a_trial_under_way_shows_phase_parameters_job_node_and_log(tmp_path: Path) -> None:
    journal = made(tmp_path / "s")
    log = journal.folder.jobs / "4711_2_0_log.out"
    with write_controller_info(journal.folder, 2):
        dispatched(journal, 0, SLURM, phase="frozen layers 43 %")
        text = status(tmp_path / "s")
        assert "warmup_steps" in text and "beta" not in text, "columns follow what is swept"
        row = next(line for line in text.splitlines() if "frozen" in line)
        assert row.split() == ["1", "frozen", "layers", "43", "%", "5", "job", "4711_2", "node7"]
        assert str(log) in text, "until it has printed something itself"
        journal.folder.trial("run-0").log.write_text("x")
        assert str(journal.folder.trial("run-0").log) in status(tmp_path / "s")
        assert f"process {os.getpid()} on" in text and "1 created, 1 running" in text
    journal.close()


def test_json_has_it_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = made(tmp_path / "s", 3)
    with write_controller_info(journal.folder, 3):
        dispatched(
            journal, 0, SLURM, phase="training", step=30, max_steps=40, trained_from=20, trained_since=time.time() - 20
        )
        dispatched(journal, 1, SLURM)
        ended(journal, 1, "failed", message="boom", given_up=True)
        dispatched(journal, 2, SLURM, loss=float("nan"), metric=float("inf"))
        assert main(["status", str(tmp_path / "s"), "--json"]) == 0
        told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (told["trials"], told["ended"], told["counts"]) == (3, 1, {"given up": 1, "running": 2})
    assert told["rows"][2]["loss"] is None, "NaN is no JSON"
    row = told["rows"][0]
    assert (row["phase"], row["node"], row["job"]["id"], row["step"]) == ("training", "node7", "4711_2", 30)
    assert row["left_s"] == pytest.approx(20, abs=2) and told["controller"]["running"] is True
    assert told["rows"][1]["message"] == "boom" and told["rows"][1]["left_s"] is None
    journal.close()


def test_all_sweeps_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = made(tmp_path / "one"), made(tmp_path / "two", 1)
    (tmp_path / "no-sweep").mkdir()
    dispatched(first, 0, SLURM)
    ended(first, 0, "completed", metric=0.25)
    dispatched(first, 1, SLURM)
    ended(first, 1, "completed", metric=0.5)
    first.close()
    second.close()
    agents = made(tmp_path / "abc123" / "run1", 1)
    agents.close()
    journal = agents.folder.journal
    journal.write_text(
        journal.read_text()
        .replace('"sweep_id": "s"', '"sweep_id": "abc123"')
        .replace('"sweep_id":"s"', '"sweep_id":"abc123"')
    )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "journal.jsonl").write_text("nonsense\n")
    text = status(tmp_path)
    rows = {line.split()[0]: line.split() for line in text.splitlines()}
    assert rows["one"][1:4] == ["2/2", "2", "completed"] and "0.5000" in rows["one"]
    assert rows["two"][1:4] == ["0/1", "1", "created"] and rows["abc123"][1] == "0/1" and "no-sweep" not in text
    assert "broken line" in text, "one that cannot be read does not hide the others"
    assert main(["status", str(tmp_path), "--json"]) == 0
    told = {Path(one["sweep"]).name: one for one in json.loads(capsys.readouterr().out)["sweeps"]}
    assert told["one"]["best"] == 0.5 and told["two"]["ended"] == 0 and "problem" in told["broken"]
    with pytest.raises(FolderError, match="or a folder of sweeps"):
        status(tmp_path / "no-sweep")


def test_made_trials_that_an_array_runs_are_counted_once_and_shown_as_what_they_do(tmp_path: Path) -> None:
    journal = made(tmp_path / "s", 4)
    journal.folder.static_array.touch()
    journal.close()
    now = time.time()
    facts = {"attempt": 1, "host": "node7", "pid": 1, "started": now - 100}
    write_json(
        journal.folder.trial("run-0").status, {**facts, "state": "running", "heartbeat": now, "phase": "training", "step": 5}
    )
    write_json(journal.folder.trial("run-1").status, {**facts, "state": "completed", "heartbeat": now})
    write_json(
        journal.folder.trial("run-2").status, {**facts, "state": "running", "heartbeat": now - 1e4, "phase": "training"}
    )
    text = status(tmp_path / "s")
    assert "1 of 4 ended" in text and "1 completed, 1 created, 1 running, 1 silent" in text, text
    rows = [line.split()[:2] for line in text.splitlines() if line.split()[0].isdecimal()]
    assert rows == [["1", "training"]]


def test_trials_of_an_array_are_ranked_without_a_controller(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = made(tmp_path / "s", 3)
    journal.folder.static_array.touch()
    journal.close()
    assert main(["leaderboard", str(tmp_path / "s")]) == 0
    assert "Submit slurm/trials.sbatch again" in capsys.readouterr().out
    now = time.time()
    status = {"attempt": 1, "host": "node7", "pid": 1, "started": now - 100, "heartbeat": now}
    metrics = {journal.record.metric: 0.25}
    write_json(journal.folder.trial("run-0").status, {**status, "state": "running", "phase": "training"})
    write_json(
        journal.folder.trial("run-1").status,
        {**status, "state": "completed", "ended": now, "metric": 0.25, "metrics": metrics},
    )
    assert main(["leaderboard", str(tmp_path / "s")]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert [row[:2] for row in rows if row and row[0] in ("1", "–")] == [["1", "2"], ["–", "1"], ["–", "3"]], text
    assert "0.2500" in text and "running" in text and "100 s" in text


def test_a_failed_check_is_no_ended_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(SweepFolder(tmp_path / "s"))
    assert "controller  checking model, SAE and data" in status(tmp_path / "s"), "while it holds the lock"
    journal.close()
    text = status(tmp_path / "s")
    assert "ended before any trial began" in text and "the sweep has ended" not in text
    assert main(["leaderboard", str(tmp_path / "s")]) == 0
    assert "the check before the first one failed" in capsys.readouterr().out


def test_a_running_sweep_has_no_winner_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = made(tmp_path / "s")
    dispatched(journal, 0, SLURM, phase="training")
    assert main(["leaderboard", str(tmp_path / "s")]) == 0
    said = capsys.readouterr().out
    assert "No winner yet" in said and "the sweep runs" in said and "again" not in said
    journal.close()
    assert main(["leaderboard", str(tmp_path / "s")]) == 0
    assert "No winner: no trial has completed yet" in capsys.readouterr().out


def test_a_deleted_folder_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = made(tmp_path / "s")
    for index in range(2):
        dispatched(journal, index, SLURM, state="completed", metrics={"eval/log_odds_chosen": 0.5}, seconds=3.0)
        ended(journal, index, "completed", metric=0.5 + index)
    journal.close()
    gone = journal.folder.trial("run-1").path
    for file in gone.iterdir():
        file.unlink()
    gone.rmdir()
    assert "trial 2, run-1, is missing" in status(tmp_path / "s")
    entry = next(e for e in read_sweep_folder(tmp_path / "s").entries if e.record.index == 1)
    assert entry.rank is None and entry.state == "deleted"
    assert main(["leaderboard", str(tmp_path / "s")]) == 0
    said = capsys.readouterr().out
    assert f"Trial 2: its folder {gone} is missing" in said and "deleted" in said


def test_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = made(tmp_path / "s", 3)
    for index in range(2):
        dispatched(journal, index, {**SLURM, "job": {"kind": "slurm", "id": f"9_{index}"}}, state="failed")
        ended(journal, index, "failed", message="boom", given_up=True)
    journal.close()
    journal.folder.trial("run-0").log.write_text("Traceback …\nValueError: boom\n")
    journal.folder.jobs.mkdir()
    (journal.folder.jobs / "9_1_0_log.out").write_text("ImportError: libcuda\n")
    for wanted in ("1", "#1", "run-0", "r0"):
        assert main(["logs", str(tmp_path / "s"), wanted]) == 0
        assert capsys.readouterr().out == "Traceback …\nValueError: boom\n"
    assert main(["logs", str(tmp_path / "s"), "2", "-f"]) == 0, "it has ended: there is nothing to wait for"
    assert capsys.readouterr().out == "ImportError: libcuda\n"
    assert main(["logs", str(tmp_path / "s"), "3"]) == 2 and "has printed nothing yet" in capsys.readouterr().err
    assert main(["logs", str(tmp_path / "s"), "4"]) == 2 and "a number from 1 to 3" in capsys.readouterr().err
    text = status(tmp_path / "s")
    assert str(journal.folder.trial("run-0").log) in text and str(journal.folder.jobs / "9_1_0_log.out") in text
    assert "Trials 1, 2 were given up. The same command tries them again" in text


def test_a_log_is_followed_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from isaerft_sweep.controller.logs import show_log

    journal = made(tmp_path / "s", 1)
    dispatched(journal, 0, SLURM)
    journal.folder.jobs.mkdir()
    (journal.folder.jobs / "4711_2_0_log.out").write_text("the worker starts\n")
    log, turns = journal.folder.trial("run-0").log, []

    def goes_on(_seconds: float) -> None:
        turns.append(1)
        with log.open("a") as file:
            file.write(f"step {len(turns)}\n")
        if len(turns) == 3:
            ended(journal, 0, "completed", metric=1.0)

    show_log(tmp_path / "s", "1", True, goes_on)
    assert capsys.readouterr().out == "the worker starts\nstep 1\nstep 2\nstep 3\n"
    journal.close()


@pytest.mark.parametrize(
    ("state", "words"),
    [("completed", "there is nothing to try again"), ("pruned", "nothing to try again"), ("diverged", "would again")],
)
def test_what_cannot_be_tried_again(state: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = made(tmp_path / "s", 1)
    dispatched(journal, 0, SLURM)
    ended(journal, 0, state)
    journal.close()
    assert main(["retry", str(tmp_path / "s"), "1"]) == 2 and words in capsys.readouterr().err


def test_a_running_controller_is_asked_to_try_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = made(tmp_path / "s", 2)
    with write_controller_info(journal.folder, 2):
        dispatched(journal, 0, SLURM)
        ended(journal, 0, "failed", given_up=True)
        assert main(["retry", str(tmp_path / "s"), "2"]) == 2 and "waits for its turn" in capsys.readouterr().err
        assert main(["retry", str(tmp_path / "s"), "1"]) == 0
        assert "to run trial 1, run-0, again" in capsys.readouterr().out
    assert journal.folder.take_retries() == [0] and journal.folder.take_retries() == []
    journal.close()


@pytest.mark.parametrize("command", ["attach", "cancel"])
def test_what_ended_before_its_first_trial_cannot_be_gone_on_with(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Journal(SweepFolder(tmp_path / "s")).close()
    assert main([command, str(tmp_path / "s")]) == 2
    assert "ended before any trial began" in capsys.readouterr().err
