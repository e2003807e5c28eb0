"""Emulated trials: the arithmetic is torch's, and what is interpolated comes near a training that really runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.toy_training import Toy
from transformers import get_scheduler

from isaerft_sweep.search.emulator import AdamW, Emulator, Interpolation, Recipe

RECIPE = Recipe(learning_rate=0.05, beta=1.0, steps=24, warmup_steps=2, schedule="linear", l1=0.0, max_grad_norm=1.0)


def test_adamw_is_torchs() -> None:
    """To the last bits: torch's vectorised square root is not the nearest number everywhere."""
    random = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(3, 500))
    theirs = torch.optim.AdamW([parameter], lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    ours = AdamW((3, 500))
    for step in range(60):
        parameter.grad = torch.randn(3, 500, generator=random) * 10 ** float(torch.randn(1, generator=random))
        theirs.param_groups[0]["lr"] = rate = 0.05 * (1 - step / 60)
        ours.step(parameter.grad.numpy(), rate)
        theirs.step()
        np.testing.assert_allclose(ours.values, parameter.detach().numpy(), rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 3, 40])
def test_rates_are_those_of_transformers(schedule: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=30)
    expected = []
    for _ in range(30):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = replace(RECIPE, learning_rate=0.3, steps=30, warmup_steps=warmup, schedule=schedule).rates
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-15)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def emulator(toy: Toy) -> Emulator:
    points = [(0.2, 5.0), (0.2, 0.3), (0.05, 1.0), (0.1, 2.0)]
    return Emulator([toy.train(replace(RECIPE, learning_rate=lr, beta=beta)) for lr, beta in points])


def gains(emulator: Emulator, recipes: list[Recipe]) -> np.ndarray:
    return emulator.metric("eval/log_odds_chosen").at(emulator.train(recipes))


def test_anchors_reproduce_themselves(emulator: Emulator) -> None:
    recipes = [anchor.recipe for anchor in emulator.anchors]
    ends = emulator.train(recipes)
    for end, coordinates in zip(ends, emulator.coordinates, strict=True):
        np.testing.assert_allclose(end, coordinates[-1], atol=0.03 * float(np.linalg.norm(coordinates[-1])))
    truth = [anchor.evaluations[RECIPE.steps]["eval/log_odds_chosen"] for anchor in emulator.anchors]
    np.testing.assert_allclose(gains(emulator, recipes), truth, atol=0.01)


def test_other_settings_come_near_what_training_gives(toy: Toy, emulator: Emulator) -> None:
    recipes = [replace(RECIPE, learning_rate=lr, beta=beta) for lr in (0.07, 0.1, 0.14) for beta in (0.5, 1.0, 2.0, 4.0)]
    truth = np.array([toy.train(recipe).evaluations[RECIPE.steps]["eval/log_odds_chosen"] for recipe in recipes])
    emulated = gains(emulator, recipes)
    assert float(np.abs(emulated - truth).max()) < 0.25 * float(np.ptp(truth)), (emulated, truth)
    assert float(np.corrcoef(emulated, truth)[0, 1]) > 0.95


@pytest.mark.parametrize(
    "change", [{"schedule": "cosine"}, {"warmup_steps": 8}, {"l1": 0.3}, {"max_grad_norm": 0.0}, {"steps": 18}]
)
def test_other_recipes_too(change: dict[str, float], toy: Toy, emulator: Emulator) -> None:
    recipe = replace(RECIPE, learning_rate=0.1, **change)  # type: ignore[arg-type]
    truth = toy.train(recipe).evaluations[recipe.steps]["eval/log_odds_chosen"]
    assert float(gains(emulator, [recipe])[0]) == pytest.approx(truth, abs=0.03)


def test_anchors_of_different_lengths(toy: Toy) -> None:
    steps = {(0.2, 5.0): 24, (0.2, 0.3): 24, (0.05, 1.0): 12, (0.1, 2.0): 24}
    mixed = Emulator([toy.train(replace(RECIPE, learning_rate=lr, beta=b, steps=n)) for (lr, b), n in steps.items()])
    for n in (8, 12, 24):
        recipe = replace(RECIPE, learning_rate=0.1, steps=n)
        truth = toy.train(recipe).evaluations[n]["eval/log_odds_chosen"]
        assert float(gains(mixed, [recipe])[0]) == pytest.approx(truth, abs=0.06)
    assert np.isnan(mixed.train([replace(RECIPE, steps=25)])).all()


def test_recipes_together_end_as_alone(emulator: Emulator) -> None:
    recipes = [replace(RECIPE, learning_rate=lr) for lr in (0.06, 0.1, 0.15)]
    together, alone = emulator.train(recipes), np.concatenate([emulator.train([recipe]) for recipe in recipes])
    np.testing.assert_allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("function", [lambda z: 3 + z[:, 0] - 2 * z[:, 1], lambda z: np.tanh(z[:, 0]) + 0.2 * z[:, 1] ** 2])
def test_interpolation(function: Callable[[np.ndarray], np.ndarray]) -> None:
    random = np.random.default_rng(0)
    known, new = random.uniform(-1, 1, (25, 2)), random.uniform(-0.7, 0.7, (50, 2))
    fitted = Interpolation(known, function(known))
    np.testing.assert_allclose(fitted.at(known), function(known), atol=1e-2)
    np.testing.assert_allclose(fitted.at(new), function(new), atol=0.05)
