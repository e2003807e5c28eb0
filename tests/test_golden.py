"""A sweep folder that an earlier version wrote still opens, reports and resumes."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.results.sweep_results import shared_untrained

RECORDED = Path(__file__).parent / "golden" / "sweep-0.1.0.tar.gz"
LOG_ODDS = {1: -0.0051, 2: -0.0052, 3: -0.0063, 4: -0.0078}
"""What that version printed, by rank."""
SEVENTH = -0.00636761449277401
"""What that version got for the seventh trial after its stop."""
COMMAND = [
    "model=tiny",
    "data.train_size=24",
    "data.eval_size=12",
    "orpo.max_steps=8",
    "orpo.max_length=300",
    "orpo.eval_fraction=0.25",
    "launcher.poll_s=0.2",
    "launcher.threads=1",
    "sweep=none",
    "sweep.file=s.yaml",
    "name=golden",
    "sweep.run_cap=7",
]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """The recorded sweep at ``outputs/golden``, where its command looks for it."""
    with tarfile.open(RECORDED) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "outputs").mkdir()
    return (tmp_path / "golden").rename(tmp_path / "outputs" / "golden")


def command(cwd: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "isaerft_sweep.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_results_are_read_as_they_were(recorded: Path) -> None:
    sweep = read_sweep_folder(recorded)
    assert not sweep.problems
    ranked = {entry.rank: entry.value("eval/log_odds_chosen") for entry in sweep.entries if entry.rank}
    assert ranked == pytest.approx(LOG_ODDS, abs=5e-5)
    assert [entry.record.index + 1 for entry in sweep.entries if entry.rank] == [6, 3, 2, 4]
    assert sorted(entry.state for entry in sweep.entries if not entry.rank) == ["diverged", "diverged", "stopped"]
    assert shared_untrained(sweep)["eval/log_odds_chosen"] == pytest.approx(0.0051, abs=5e-5)


def test_the_commands_read_it(recorded: Path, tmp_path: Path) -> None:
    assert "-0.0051" in command(tmp_path, "leaderboard", "outputs/golden")
    assert "orpo.beta=1.0" in command(tmp_path, "best", "outputs/golden", "--as", "overrides")
    command(tmp_path, "report", "outputs/golden")
    assert "tiny-llama" in (recorded / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_its_command_resumes_it(
    recorded: Path, tmp_path: Path, launch: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = launch(*COMMAND)
    assert done.returncode == 0, done.stderr
    sweep = read_sweep_folder(recorded)
    assert len(sweep.entries) == 7
    seventh = next(entry for entry in sweep.entries if entry.record.index == 6)
    assert seventh.value("eval/log_odds_chosen") == pytest.approx(SEVENTH, rel=1e-3)
    assert seventh.folder is not None
    steps = [row["step"] for row in seventh.folder.read_metrics() if "train/loss" in row]
    assert steps == list(range(1, 9))
    assert seventh.record.attempt == 2
