"""The Python API: what a notebook does with a sweep."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import TINY

import isaerft_sweep as isw
from isaerft_sweep.errors import ConfigError, FolderError, SpaceError

RECORDED = Path(__file__).parent / "golden" / "sweep-0.1.0.tar.gz"


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    with tarfile.open(RECORDED) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "golden"


def test_a_sweep_as_a_table(recorded: Path) -> None:
    sweep = isw.load_sweep(recorded)
    assert (sweep.name, sweep.metric, sweep.goal) == ("golden", "eval/log_odds_chosen", "maximize")
    table = sweep.to_dataframe()
    assert len(table) == 7 and list(table["rank"].dropna()) == [1, 2, 3, 4]
    best = sweep.best()
    row = table.loc[best.name]
    assert row["orpo.beta"] == best.params["orpo.beta"] == 1.0
    assert row["eval/log_odds_chosen"] == best.metrics["eval/log_odds_chosen"] == pytest.approx(-0.0051, abs=5e-5)
    assert row["low_95"] < row["eval/log_odds_chosen"] < row["high_95"]
    assert best.path.is_dir() and [r["step"] for r in best.history() if "train/loss" in r] == list(range(1, 9))
    assert {trial.state for trial in sweep.trials} == {"completed", "diverged", "stopped"}


def test_another_metric_and_mistakes(recorded: Path, tmp_path: Path) -> None:
    assert isw.load_sweep(str(recorded), "eval/nll_loss").goal == "minimize"
    with pytest.raises(SpaceError, match="is not logged by any trial"):
        isw.load_sweep(recorded, "eval/nll")
    with pytest.raises(FolderError, match="must be a sweep's folder"):
        isw.load_sweep(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"Did you mean 'orpo\.beta'"):
        isw.run(["orpo.betta=1"])
    with pytest.raises(AttributeError, match="has no attribute 'lode_sweep'"):
        isw.lode_sweep  # noqa: B018


def test_importing_it_loads_neither_torch_nor_pandas() -> None:
    code = "import sys, isaerft_sweep as isw; isw.load_sweep, isw.run; print([m for m in ('torch', 'pandas', 'hydra') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_from_running_to_the_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = isw.run([*TINY, "sweep=quick", "sweep.run_cap=2", "name=first", "tracker=disabled"])
    assert sweep.name == "first" and len(sweep.trials) == 2
    model, tokenizer = sweep.best().load_model()
    tokens = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=3)
    assert tokens.shape[0] == 1
    more = isw.run([*TINY, "sweep=quick", "sweep.run_cap=3", "name=first", "tracker=disabled"])
    assert len(more.trials) == 3, "it goes on with the same sweep"
