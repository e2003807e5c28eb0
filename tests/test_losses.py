"""The losses: against formulas written out in NumPy, against TRL's functions, and step by step against TRL's own trainers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.plain_trl import trained_rows
from helpers.trials import (
    OFF,
    Made,
    rows_of,
)

from isaerft_sweep.specs import OrpoSpec
from isaerft_sweep.trial.losses import LOSSES, PairLogps, PreferenceLoss, make_loss
from isaerft_sweep.trial.runner import run_trial
from isaerft_sweep.trial.train_loop import Order

RNG = np.random.default_rng(0)
TOKENS = (RNG.integers(3, 40, 16), RNG.integers(3, 40, 16))
MEANS = (-RNG.gamma(2, 1, 16) - 1e-3, -RNG.gamma(2, 1, 16) - 1e-3)
REFERENCE = tuple(n * (m - 0.1 * RNG.normal(size=16)) for n, m in zip(TOKENS, MEANS, strict=True))


def spec(loss: str, **more: Any) -> OrpoSpec:
    return OrpoSpec(learning_rate=0.1, loss=loss, **{"beta": 0.3, **more})


def batch(requires_grad: bool = False) -> PairLogps:
    chosen, rejected = (torch.tensor(m, requires_grad=requires_grad) for m in MEANS)
    tokens = [torch.tensor(n) for n in TOKENS]
    reference = [torch.tensor(sums) for sums in REFERENCE]
    return PairLogps(chosen, rejected, *tokens, torch.tensor(2.5, dtype=torch.float64), *reference)


def by_the_formula(loss: str, beta: float, gamma: float) -> float:
    """The papers' equations, in NumPy."""
    chosen, rejected = MEANS
    sums = [n * m for n, m in zip(TOKENS, MEANS, strict=True)]

    def log_sigmoid(x: np.ndarray) -> np.ndarray:
        return -np.logaddexp(0, -x)

    if loss == "orpo":
        odds = [np.log(np.exp(m) / (1 - np.exp(m))) for m in (chosen, rejected)]
        return 2.5 - beta * log_sigmoid(odds[0] - odds[1]).mean()
    if loss == "dpo":
        return -log_sigmoid(beta * ((sums[0] - REFERENCE[0]) - (sums[1] - REFERENCE[1]))).mean()
    if loss == "simpo":
        return -log_sigmoid(beta * (chosen - rejected) - gamma).mean()
    return -sums[0].sum() / TOKENS[0].sum() - log_sigmoid(beta * (sums[0] - sums[1])).mean()


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_the_formula(loss: str, beta: float) -> None:
    found = make_loss(spec(loss, beta=beta, gamma=0.7))(batch())
    assert float(found) == pytest.approx(by_the_formula(loss, beta, 0.7), rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_its_gradient_is_right(loss: str) -> None:
    made: PreferenceLoss = make_loss(spec(loss))

    def of(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        known = batch()
        return made(PairLogps(chosen, rejected, *list(vars(known).values())[2:]))

    start = batch(requires_grad=True)
    assert torch.autograd.gradcheck(of, (start.chosen, start.rejected))


def test_probabilities_near_one_and_zero_are_no_trouble() -> None:
    logps = torch.tensor([-1e-7, -1e-3, -0.69, -0.7, -5.0, -80.0], dtype=torch.float64)
    tokens = torch.ones(6)
    odds = PairLogps(logps, torch.full_like(logps, -1.0), tokens, tokens).log_odds
    expected = logps - torch.log(-torch.expm1(logps)) + 1.0 + np.log1p(-np.exp(-1.0))
    torch.testing.assert_close(odds, expected, rtol=1e-6, atol=1e-9)


ORACLES = {
    "orpo": ("trl.experimental.orpo", "ORPOTrainer", "ORPOConfig", {}),
    "cpo": ("trl.experimental.cpo", "CPOTrainer", "CPOConfig", {"loss_type": "sigmoid", "cpo_alpha": 1.0}),
    "simpo": (
        "trl.experimental.cpo",
        "CPOTrainer",
        "CPOConfig",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5},
    ),
    "dpo": ("trl", "DPOTrainer", "DPOConfig", {"precompute_ref_log_probs": True}),
}
"""TRL's own trainers."""
SHORT = {"orpo": 2.0, "cpo": 0.1, "simpo": 2.0, "dpo": 0.1}


def as_dpo_wants_it(_trainer: Any, dataset: Any, *_: Any) -> Any:
    """Our token ids as DPOTrainer's: it would frame the texts in another way than ORPO's and CPO's trainers do."""

    def split(row: Any) -> Any:
        length = row["chosen_prompt_length"]
        assert length == row["rejected_prompt_length"]
        return {
            "prompt_ids": row["chosen_ids"][:length],
            **{f"{s}_ids": row[f"{s}_ids"][length:] for s in ("chosen", "rejected")},
        }

    return dataset.map(split, remove_columns=dataset.column_names)


@pytest.mark.slow
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("loss", ["cpo", "simpo", "dpo"])
def test_every_step_is_trls(
    loss: str,
    stored: bool,
    trial: Made,
    tmp_path: Path,
    gradients: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, trainer, config, more = ORACLES[loss]
    oracle = pytest.importorskip(module, reason="this TRL does not have it")
    folder = trial(
        *OFF,
        f"orpo.loss={loss}",
        f"orpo.beta={SHORT[loss]}",
        "orpo.eval_untrained=never",
        f"launcher.lean_logits={stored}",
        f"launcher.activation_cache_gb={int(stored)}",
    )
    assert run_trial(folder, 1) == "completed", folder.read_status()
    mine = list(gradients)
    gradients.clear()
    if loss == "dpo":
        monkeypatch.setattr(oracle.DPOTrainer, "_prepare_dataset", as_dpo_wants_it)
    experiment = folder.read_spec().experiment
    rows = trained_rows(getattr(oracle, trainer), getattr(oracle, config), experiment, tmp_path / "trl", **more)
    assert len(mine) == len(gradients) == 4
    for found, expected in zip(mine, gradients, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-3
    ours = rows_of(folder)
    assert len(ours) == len(rows) == 5
    for found, expected in zip(ours, rows, strict=True):
        names = {key: f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}" for key in expected}
        # TRL's log-probabilities are sums here, and its means of logits count padding; an evaluation's mean of batches is one batch
        shared = {key: name for key, name in names.items() if name in found and "log" not in key and "nll" not in key}
        assert len(shared) >= (5 if "eval_loss" in expected else 7), sorted(shared)
        for key, name in shared.items():
            assert found[name] == pytest.approx(expected[key], rel=5e-4, abs=5e-5), (found["step"], name)


@pytest.mark.slow
def test_epochs_accumulation_and_what_is_left_over_are_trls(
    trial: Made,
    tmp_path: Path,
    gradients: list[torch.Tensor],
) -> None:
    """24 pairs in batches of 5, three of them a step: the last step of an epoch has two batches, the last batch four pairs."""
    orpo = pytest.importorskip("trl.experimental.orpo", reason="this TRL does not have it")
    sizes = ("orpo.batch_size=5", "orpo.gradient_accumulation=3", "orpo.max_steps=-1", "orpo.epochs=2.5")
    folder = trial(
        *OFF, *sizes, "orpo.eval_untrained=never", "orpo.eval_fraction=1", "orpo.weight_decay=0.1", "adapter=scale"
    )
    assert run_trial(folder, 1) == "completed", folder.read_status()
    mine = list(gradients)
    gradients.clear()
    rows = trained_rows(orpo.ORPOTrainer, orpo.ORPOConfig, folder.read_spec().experiment, tmp_path / "trl")
    assert len(mine) == len(gradients) == 5
    for found, expected in zip(mine, gradients, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-3
    for found, expected in zip(rows_of(folder)[:5], rows[:5], strict=True):
        # not the rewards: with several batches a step TRL leaves the last pairs of an epoch out of their means
        for key in ("loss", "grad_norm", "learning_rate", "epoch", "nll_loss"):
            assert found[f"train/{key}"] == pytest.approx(expected[key], rel=5e-4, abs=5e-5), (found["step"], key)


def test_the_order_takes_every_pair_once_an_epoch() -> None:
    order = Order(24, spec("orpo", batch_size=5, gradient_accumulation=3))
    assert (order.batches_per_epoch, order.steps_per_epoch) == (5, 2)
    for epoch in range(3):
        taken = [pair for step in (0, 1) for rows in order.step(2 * epoch + step) for pair in rows]
        assert sorted(taken) == list(range(24))
    assert order.step(0) != order.step(2), "another order in the next epoch"
    assert order.reached(1) == [pair for rows in order.step(0) for pair in rows] and order.reached(2) == list(range(24))
    assert [order.epochs_after(steps) for steps in range(5)] == pytest.approx([0, 0.6, 1, 1.6, 2])


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_a_resumed_trial_is_the_same(loss: str, trial: Made) -> None:
    options = (*OFF, f"orpo.loss={loss}", f"orpo.beta={SHORT[loss]}", "orpo.max_steps=6")
    whole, cut = trial(*options, name="whole"), trial(*options, name="cut")
    assert run_trial(whole, 1) == "completed"
    cut.ask_to_stop()
    assert run_trial(cut, 1) == "stopped"
    cut.begin_attempt(2)
    assert run_trial(cut, 2) == "completed" and rows_of(cut) == rows_of(whole)


WITHOUT_TRL = """
import sys
sys.modules["trl"] = None  # importing it raises ImportError
from pathlib import Path
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.trial.prepare import prepare
from isaerft_sweep.trial.runner import run_trial
folder = TrialFolder(Path(sys.argv[1]))
prepare(folder.read_spec().experiment)
state = run_trial(folder, 1)
assert state == "completed", folder.read_status()
assert not any(name.startswith("trl.") for name in sys.modules)
"""


@pytest.mark.slow
def test_no_trial_needs_trl(trial: Made) -> None:
    folder = trial(*OFF)
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRL, str(folder.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
