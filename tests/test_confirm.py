"""The leaders of a sweep, run again with new seeds through the real command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, events
from helpers.sweeps import make_sweep

from isaerft_sweep.cli import main
from isaerft_sweep.controller.confirm import find_leaders, point_with_seed, with_settings
from isaerft_sweep.errors import ConfigError
from isaerft_sweep.results.confirmation import read_confirmation
from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.search.sampler import FixedPoints, Point


def command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "isaerft_sweep.cli", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.long
def test_confirm_runs_new_seeds_of_the_leaders(launch, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = ['{"prompt": "p%d ", "chosen": "gladly %d", "rejected": "no"}' % (i, i) for i in range(40)]  # noqa: UP031
    data.write_text("\n".join(rows) + "\n")
    done = launch(
        *TINY, "name=s", "sweep.run_cap=3", "tracker=disabled", "data=jsonl", f"data.path={data}", "data.eval_size=8"
    )
    assert done.returncode == 0, done.stderr
    first = read_sweep_folder(tmp_path / "outputs" / "s")
    assert not first.seeds_known
    again = command(tmp_path, "confirm", "outputs/s", "--top", "2", "--seeds", "2", "--set", "launcher.slots=2")
    assert again.returncode == 0, again.stderr + again.stdout
    assert "first run" in again.stdout, "columns are whole in a log"
    assert "Leaders with new seeds" in again.stdout and "has the best expected value over seeds" in again.stdout
    after = read_sweep_folder(tmp_path / "outputs" / "s")
    assert after.seeds_known and after.seed_sd is not None and len(after.confirmation) == 4
    expected = [entry.expected or 0.0 for entry in after.entries]
    assert expected == sorted(expected, reverse=True) and [entry.rank for entry in after.entries] == [1, 2, 3]
    candidates = read_confirmation(after)
    assert {c.first.record.index for c in candidates} == {e.record.index for e in first.entries[:2]}
    for candidate in candidates:
        assert sorted(candidate.values) == [43, 44] and candidate.first.probability_best is not None
        assert candidate.mean == pytest.approx(sum(candidate.values.values()) / 2)
    assert sum(e.probability_best or 0 for e in after.entries) == pytest.approx(1)
    folder = tmp_path / "outputs" / "s-confirm"
    specs = [e["params"] for e in events(folder) if e["event"] == "trial"]
    assert len(specs) == 4 and {p["orpo.seed"] for p in specs} == {43, 44}

    attached = command(tmp_path, "attach", "outputs/s-confirm")
    assert attached.returncode == 2 and f"isaerft-sweep confirm {tmp_path / 'outputs' / 's'}" in attached.stderr
    more = command(tmp_path, "confirm", "outputs/s", "--top", "2", "--seeds", "3")
    assert more.returncode == 0 and "4 already ended" in more.stdout, "a larger number adds trials"
    assert len([e for e in events(folder) if e["event"] == "trial"]) == 6
    data.write_text(data.read_text().replace("gladly", "sadly"))
    changed = command(tmp_path, "confirm", "outputs/s", "--top", "2", "--seeds", "4")
    assert changed.returncode == 2 and "must be unchanged" in changed.stderr and "Traceback" not in changed.stderr
    assert len(list((folder / "trials").iterdir())) == 6


def test_a_foreign_folder_of_that_name_is_not_the_confirmation(tmp_path: Path) -> None:
    make_sweep(tmp_path / "s")
    make_sweep(tmp_path / "s-confirm")
    assert read_confirmation(read_sweep_folder(tmp_path / "s")) == []
    assert main(["leaderboard", str(tmp_path / "s")]) == 0


def test_leaders_that_differ_in_their_seed_alone_are_one(tmp_path: Path) -> None:
    sweep = read_sweep_folder(make_sweep(tmp_path / "s").path)
    for i, entry in enumerate(sweep.entries):
        same = {"orpo.learning_rate": 0.01 * (i // 2), "orpo.beta": 0.1, "orpo.seed": i}
        entry.record.point = Point(same)
    leaders = find_leaders(sweep)
    assert [entry.rank for entry in leaders] == [1, 3, 5], "the best of each"
    assert point_with_seed(leaders[0], 9).params == {**leaders[0].params, "orpo.seed": 9}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--top", "0"], "--top must be at least 1"), (["--seeds", "-1"], "--seeds must be at least 1")],
)
def test_bad_numbers(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["confirm", str(tmp_path), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_only_what_cannot_change_a_result_can_be_set(experiment) -> None:
    composed = experiment("model=tiny")
    assert with_settings(composed, ["launcher.slots=2", "tracker.mode=disabled"]).launcher.slots == 2
    for bad in ("orpo.beta=1", "launcher", "launcher.=1", "launcher.slot=2", "launcher.slots=many", "launcher.slots=[1"):
        with pytest.raises(ConfigError):
            with_settings(composed, [bad])


def test_given_points_go_on_after_a_restart() -> None:
    points = [Point({"orpo.seed": i}) for i in range(4)]
    first = FixedPoints(points)
    assert first.size == 4 and first.ask() == points[0]
    second = FixedPoints(points[1:])
    second.restore(points[0])
    second.restore(points[2])
    assert second.size == 4
    assert [second.ask(), second.ask(), second.ask()] == [points[1], points[3], None]
