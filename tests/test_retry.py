"""A trial that fails among others: said, looked at, and tried again alone."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, events
from helpers.sweeps import ended_states, start
from helpers.waiting import wait_for

pytestmark = pytest.mark.slow
BROKEN = """
import builtins, os, pathlib, sys, time

said = builtins.print

def print_or_fail(*args, **kwargs):
    said(*args, **kwargs)
    if args and str(args[0]).startswith("step 2/"):
        log = pathlib.Path(sys.stdout._streams[-1].name)
        fails = '"index": 1,' in (log.parent / "spec.json").read_text()
        if fails and pathlib.Path(os.environ["TEST_BROKEN"]).exists():
            raise RuntimeError("broken on purpose")
    if args and str(args[0]).startswith("step "):
        time.sleep(float(os.environ.get("TEST_PACE_S", "0")))

builtins.print = print_or_fail
"""
OPTIONS = (*TINY, "name=s", "sweep.run_cap=3", "tracker=disabled", "launcher.max_retries=0", "adapter.kind=bias")


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sweep's second trial fails in its second step while this file is there."""
    folder = tmp_path / ".broken"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{Path(__file__).parents[1]}")
    monkeypatch.setenv("TEST_BROKEN", str(tmp_path / "fails"))
    (tmp_path / "fails").touch()
    return tmp_path / "fails"


def cli(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isaerft_sweep.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("resident", ["true", "false"])
@pytest.mark.long
def test_it_is_said_and_tried_again_alone(resident: str, broken: Path, launch: Callable, tmp_path: Path) -> None:
    done = launch(*OPTIONS, f"launcher.resident={resident}")
    sweep = tmp_path / "outputs" / "s"
    assert done.returncode == 1 and ended_states(sweep) == {"completed": 2, "failed": 1}, done.stdout + done.stderr
    log = next(path for path in sweep.glob("trials/*/log.out") if "broken on purpose" in path.read_text())
    assert f"its log: {log.relative_to(tmp_path)}" in done.stdout
    assert "Trial 2 was given up. The same command tries it again" in done.stdout
    assert "isaerft-sweep retry outputs/s 2" in done.stdout
    printed = cli(tmp_path, "logs", "outputs/s", "2")
    assert "Traceback (most recent call last)" in printed.stdout and "RuntimeError: broken on purpose" in printed.stdout
    assert printed.stdout == log.read_text()
    told = cli(tmp_path, "status", "outputs/s").stdout
    assert "given up: " in told and str(log) in told and "Trial 2 was given up" in told

    broken.unlink()
    again = cli(tmp_path, "retry", "outputs/s", "2")
    assert again.returncode == 0 and "completed" in again.stdout.splitlines()[-1], again.stdout + again.stderr
    dispatched = Counter(event["index"] for event in events(sweep) if event["event"] == "dispatch")
    assert dispatched == {0: 1, 1: 2, 2: 1} and ended_states(sweep) == {"completed": 3, "failed": 1}
    assert cli(tmp_path, "retry", "outputs/s", "2").returncode == 2
    assert launch(*OPTIONS, f"launcher.resident={resident}").returncode == 0
    assert len(events(sweep)) == 1 + 3 + 4 + 4, "nothing is left to do"


@pytest.mark.long
def test_a_controller_that_runs_takes_it_up(broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_PACE_S", "0.4")
    sweep = tmp_path / "outputs" / "s"
    controller = start(tmp_path, *OPTIONS, "orpo.max_steps=20")
    wait_for(lambda: (sweep / "journal.jsonl").exists() and ended_states(sweep)["failed"] == 1)
    broken.unlink()
    asked = cli(tmp_path, "retry", "outputs/s", "2")
    assert asked.returncode == 0 and "to run trial 2" in asked.stdout, asked.stderr
    assert controller.wait(200) == 0
    assert ended_states(sweep) == {"completed": 3, "failed": 1}
    assert "given up" not in (tmp_path / "controller.out").read_text()


def test_ctrl_c_says_at_once_how_long_it_may_take(broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal
    import time

    monkeypatch.setenv("TEST_PACE_S", "3")  # a long step: nothing can end before it is over
    controller = start(tmp_path, *OPTIONS, "orpo.max_steps=1000", "launcher.grace_s=40", "launcher.poll_s=5")
    wait_for(lambda: any("trained_since" in path.read_text() for path in tmp_path.glob("outputs/s/trials/*/status.json")))
    controller.send_signal(signal.SIGINT)
    asked_s = time.monotonic()
    said = wait_for(lambda: "stopping, at most 40 s; Ctrl-C again ends it now" in (tmp_path / "controller.out").read_text())
    assert said and time.monotonic() - asked_s < 1
    assert controller.wait(60) == 130
