"""The harm of an adapter: KL to the base and the NLL of neutral text, against sums over all logits of the plain model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from helpers.trials import LEVELS, OFF, Made, rows_of

from isaerft_sweep.adapter.load import load_model
from isaerft_sweep.errors import DataError
from isaerft_sweep.metrics import HARM
from isaerft_sweep.models.loading import load, load_tokenizer
from isaerft_sweep.paths import asset
from isaerft_sweep.trial.data import load_pairs
from isaerft_sweep.trial.harm import KL_PAIRS, read_neutral
from isaerft_sweep.trial.runner import run_trial


@torch.no_grad()
def by_all_logits(folder: Any) -> dict[str, float]:
    """Log-softmax of every logit, sequence by sequence, of the saved adapter and of the plain model."""
    experiment = folder.read_spec().experiment
    base = load(experiment.model, None).model.eval()
    adapted = load_model(folder.adapter)[0].eval()
    tokenizer, length = load_tokenizer(experiment.model, None), experiment.orpo.max_length
    divergences: list[float] = []
    for row in load_pairs(experiment.data, tokenizer, length).evaluation.select(
        range(min(KL_PAIRS, experiment.data.eval_size))
    ):
        ids = torch.tensor([row["chosen_ids"]])
        p, q = (model(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1) for model in (base, adapted))
        divergences += (p.exp() * (p - q)).sum(-1)[row["chosen_prompt_length"] - 1 :].tolist()
    losses: dict[int, list[float]] = {0: [], 1: []}
    for text in asset("data", "neutral.txt").read_text().splitlines():
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:length]])
        for which, model in enumerate((base, adapted)):
            logps = model(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            losses[which] += (-logps.gather(-1, ids[0, 1:, None])[:, 0]).tolist()
    base_nll, nll = (sum(one) / len(one) for one in losses.values())
    kl = sum(divergences) / len(divergences)
    return {"eval/kl_base": kl, "eval/neutral_nll": nll, "eval/neutral_nll_rise": nll - base_nll}


@pytest.mark.parametrize("level", LEVELS)
def test_it_is_what_all_logits_say(level: str, trial: Made) -> None:
    stored, lean = LEVELS[level]
    options = (f"launcher.activation_cache_gb={stored}", f"launcher.lean_logits={lean}", "orpo.learning_rate=0.5")
    folder = trial(*OFF, *options, "orpo.warmup_steps=0", "orpo.eval_untrained=always")
    assert run_trial(folder, 1) == "completed", folder.read_status()
    rows = [row for row in rows_of(folder) if "eval/kl_base" in row]
    assert len(rows) == 2, "at every evaluation"
    assert rows[0]["eval/kl_base"] == pytest.approx(0, abs=1e-6) and rows[0]["eval/neutral_nll_rise"] == pytest.approx(
        0, abs=1e-6
    )
    expected = by_all_logits(folder)
    assert expected["eval/kl_base"] > 1e-3
    for name, value in expected.items():
        assert rows[-1][name] == pytest.approx(value, rel=2e-3, abs=2e-5), name
    card = folder.card.read_text()
    assert "| eval/kl_base |" in card and "| eval/neutral_nll_rise |" in card


def test_it_can_be_left_out_and_changes_no_other_number(trial: Made) -> None:
    measured, left_out = trial(*OFF, name="measured"), trial(*OFF, "orpo.eval_harm=false", name="left-out")
    assert run_trial(measured, 1) == run_trial(left_out, 1) == "completed"
    with_harm, without = rows_of(measured), rows_of(left_out)
    assert not any(name in row for row in without for name in HARM)
    for row, same in zip(with_harm, without, strict=True):
        assert {k: v for k, v in row.items() if k not in HARM} == pytest.approx(same, rel=1e-4, abs=1e-6)
    specs = [json.loads(folder.spec.read_text())["identity"] for folder in (measured, left_out)]
    assert specs[0] == specs[1]


def test_text_of_ones_own(trial: Made, tmp_path: Path) -> None:
    path = tmp_path / "neutral.txt"
    path.write_text("One short text about nothing.\n\nAnother one.\n")
    folder = trial(*OFF, f"data.neutral_path={path}")
    assert run_trial(folder, 1) == "completed", folder.read_status()
    assert math.isfinite(folder.read_status().metrics["eval/neutral_nll"])


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot be read"), (b"\n\n", "has none of two tokens"), (b"\xff\xfe", "cannot be read")]
)
def test_bad_text_is_refused_before_the_first_trial(
    content: bytes | None, said: str, experiment: Any, tmp_path: Path
) -> None:
    from isaerft_sweep.trial.prepare import prepare

    path = tmp_path / "neutral.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"data.neutral_path must be a text file.*{said}"):
        prepare(experiment(*TINY, f"data.neutral_path={path}"))


def test_the_text_that_ships_fits_every_trial() -> None:
    texts = asset("data", "neutral.txt").read_text().splitlines()
    assert len(texts) == 24 and all(120 < len(text) < 300 for text in texts)
    assert len(set(texts)) == 24 and read_neutral.__doc__
