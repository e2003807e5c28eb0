"""Test pairs: no ranking sees them, nothing of the training or the held-out pairs depends on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TINY
from helpers.trials import OFF, Made, rows_of

from isaerft_sweep.config.compose import compose
from isaerft_sweep.errors import DataError, SpaceError
from isaerft_sweep.models.loading import load_tokenizer
from isaerft_sweep.results.sureness import MIN_PAIRS
from isaerft_sweep.search.sweep_file import read_sweep
from isaerft_sweep.specs import identity
from isaerft_sweep.trial.data import Pairs, load_pairs
from isaerft_sweep.trial.runner import run_trial


def pairs_of(*options: str) -> Pairs:
    experiment = compose([*TINY, *options])
    return load_pairs(experiment.data, load_tokenizer(experiment.model, None), 300)


def write(path: Path, prompts: int, answers: int = 1) -> Path:
    rows = [
        {"prompt": f"question {i} ", "chosen": f"gladly {i} {j}", "rejected": f"no {i} {j}"}
        for i in range(prompts)
        for j in range(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(rows: object) -> set[str]:
    return {row["prompt"] for row in rows}  # type: ignore[attr-defined]


def test_as_many_as_are_held_out_and_no_prompt_of_the_others() -> None:
    found, without = pairs_of(), pairs_of("data.test_size=0")
    assert len(found.test) == len(found.evaluation) == 8 and len(without.test) == 0
    assert found.train[:] == without.train[:] and found.evaluation[:] == without.evaluation[:]
    assert not prompts(found.test) & (prompts(found.train) | prompts(found.evaluation))
    assert "8 to test on" in found.summary and found.counts["test"] == 8


def test_none_where_all_pairs_are_used(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", 30)
    options = ("data=jsonl", f"data.path={file}", "data.eval_size=5", "data.train_size=null")
    assert len(pairs_of(*options).test) == 0, "the training pairs stay what they were"
    with pytest.raises(DataError, match=r"data.test_size must be at most .* 0 of files, but got 4.*data.train_size=N"):
        pairs_of(*options, "data.test_size=4")
    assert len(pairs_of(*options, "data.train_size=20", "data.test_size=4").test) == 4


def test_a_prompt_with_several_answers_stays_on_one_side(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", 12, answers=5)
    found = pairs_of("data=jsonl", f"data.path={file}", "data.eval_size=5", "data.train_size=22")
    assert len(found.test) == 5 and not prompts(found.test) & prompts(found.train)


def test_what_is_left_of_a_file_of_held_out_pairs(tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(write(tmp_path / "q.jsonl", 20).read_text().replace("question", "quest"))
    file = write(tmp_path / "p.jsonl", 9)
    found = pairs_of("data=jsonl", f"data.path={file}", f"data.eval_path={held_out}", "data.eval_size=8")
    assert [len(rows) for rows in (found.train, found.evaluation, found.test)] == [9, 8, 8]


def test_a_trial_measures_them_before_and_after(trial: Made) -> None:
    folder, other = trial(*OFF, name="a"), trial(*OFF, "data.test_size=0", name="b")
    assert run_trial(folder, 1) == run_trial(other, 1) == "completed"
    rows = rows_of(folder)
    tested = [row["step"] for row in rows if "test/log_odds_chosen" in row]
    assert tested == [0, 4], "the untrained model, and at the end: never on the way"
    for row, plain in zip(rows, rows_of(other), strict=True):
        rest = {k: v for k, v in row.items() if not k.startswith("test/")}
        assert rest == pytest.approx(plain, rel=1e-4, abs=1e-6), "no other number changes"
    scores = folder.read_evaluation()
    assert {len(scores[name]["pairs"]) for name in ("test_untrained", "test_trained")} == {8} and MIN_PAIRS <= 8
    assert not set(scores["test_trained"]["pairs"]) & set(scores["trained"]["pairs"])
    assert "test/log_odds_chosen" in (folder.adapter / "README.md").read_text()


def test_no_sweep_can_rank_by_them_and_no_fingerprint_has_them() -> None:
    with pytest.raises(SpaceError, match="test/log_odds_chosen' is not logged"):
        read_sweep(
            {"method": "random", "metric": {"name": "test/log_odds_chosen"}, "parameters": {"orpo.beta": {"value": 1}}}
        )
    assert identity(compose(list(TINY))) == identity(compose([*TINY, "data.test_size=3"]))
