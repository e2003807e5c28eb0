"""Are stated probabilities and intervals true? Simulated sweeps with a known best trial.

    python benchmarks/trust.py [--sweeps 40] [--out trust.json]

Each simulated sweep has 8 or 30 trials at random points of the unit square and 12, 48 or 500 held-out pairs. The quality of
a point comes from a surface (rising to a corner, a ridge, a random field, a cliff, or independent values), scaled to a
standard deviation of 0.082; pairs vary by 0.48, each trial's deviations on pairs by 0.062: what the demo's sweep has. Seeds
vary by 0, 1/4, 1/2 or 1 times the root mean square difference between a trial and its nearest neighbour. An estimator
chooses a winner and states the probability that its quality is the largest. Brier: mean of (stated - true)^2.

Rows of the first table: "bootstrap over pairs" is what leaderboards without a model of seeds state; "true seed variance"
knows it and has a flat prior on the qualities; "Bayes-optimal" knows the seed variance and that qualities are independent
and normal with the given standard deviation (optimal where they are). "after confirm 3 x 3": the three leaders ran again
with three new seeds each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from isaerft_sweep.results.posterior import Posterior, Trials, posterior
from isaerft_sweep.results.statistics import interval

TRIAL_SD, PAIR_SD, DEVIATION_SD = 0.082, 0.48, 0.062
RATIOS = (0.0, 0.25, 0.5, 1.0)
SURFACES = ("rising", "ridge", "field", "cliff", "independent")
DRAWS = 2000


@dataclass(frozen=True)
class World:
    """One simulated sweep: ``quality`` [trials], known only to the simulation; ``places`` [trials, 2]."""

    quality: np.ndarray
    places: np.ndarray
    pair: np.ndarray
    deviation: np.ndarray
    seed_sd: float
    ratio: float

    def run(self, trial: int, rng: np.random.Generator) -> np.ndarray:
        """One trial with a new seed: its values on the pairs [pairs]."""
        return self.quality[trial] + self.seed_sd * rng.standard_normal() + self.pair + self.deviation[trial]


def make_world(trials: int, pairs: int, ratio: float, surface: str, rng: np.random.Generator) -> World:
    """A sweep whose trials vary by ``TRIAL_SD`` and whose seeds by ``ratio`` times the neighbours' difference."""
    places = rng.random((trials, 2))
    x, y = places.T
    if surface == "rising":  # as log odds do with learning rate and beta
        quality = x + y * rng.uniform(0, 0.5) + x * y
    elif surface == "ridge":
        quality = -((x + 0.6 * y - rng.uniform(0.4, 1.2)) ** 2) + 0.2 * y
    elif surface == "cliff":
        quality = np.where(x < rng.uniform(0.5, 0.9), x + 0.3 * y, -0.5 - x)
    elif surface == "field":
        waves, phases = rng.normal(0, 4, (20, 2)), rng.uniform(0, 2 * np.pi, 20)
        quality = np.cos(places @ waves.T + phases).sum(axis=1)
    else:
        quality = rng.standard_normal(trials)
    if surface != "independent":
        quality = quality / quality.std()
    quality = TRIAL_SD * quality
    distance = ((places[:, None] - places[None]) ** 2).sum(-1) + np.diag(np.full(trials, np.inf))
    neighbours = float(np.sqrt(np.mean((quality - quality[distance.argmin(axis=1)]) ** 2)))
    pair, deviation = PAIR_SD * rng.standard_normal(pairs), DEVIATION_SD * rng.standard_normal((trials, pairs))
    return World(quality, places, pair, deviation, ratio * neighbours, ratio)


@dataclass
class Statement:
    """What an estimator said of its winner, and whether it was so."""

    stated: float
    is_best: bool
    interval: tuple[float, float]
    quality: float

    @property
    def covered(self) -> bool:
        return self.interval[0] <= self.quality <= self.interval[1]


def bootstrap(world: World, table: np.ndarray, rng: np.random.Generator) -> tuple[int, float, tuple[float, float]]:
    """Resamples of the pairs; the winner has the best mean."""
    pairs = table.shape[1]
    winner = int(table.mean(axis=1).argmax())
    means = rng.multinomial(pairs, np.full(pairs, 1 / pairs), size=DRAWS) @ table.T / pairs
    share = float((means.argmax(axis=1) == winner).mean())
    return winner, share, interval(table[winner]) or (-np.inf, np.inf)


def with_true_seeds(world: World, table: np.ndarray, rng: np.random.Generator) -> tuple[int, float, tuple[float, float]]:
    """A flat prior on the qualities."""
    noise = np.sqrt(world.seed_sd**2 + DEVIATION_SD**2 / table.shape[1])
    return _normal(table, 1.0, noise, rng)


def optimal(world: World, table: np.ndarray, rng: np.random.Generator) -> tuple[int, float, tuple[float, float]]:
    """The prior from which independent surfaces are drawn."""
    variance = world.seed_sd**2 + DEVIATION_SD**2 / table.shape[1]
    shrink = TRIAL_SD**2 / (TRIAL_SD**2 + variance)
    return _normal(table, shrink, np.sqrt(shrink * variance), rng)


def _normal(table: np.ndarray, shrink: float, sd: float, rng: np.random.Generator) -> tuple[int, float, tuple[float, float]]:
    means = table.mean(axis=1)
    centre = means.mean() + shrink * (means - means.mean())
    draws = centre + sd * rng.standard_normal((DRAWS, len(means)))
    winner = int(means.argmax())
    half = 1.96 * np.hypot(sd, PAIR_SD / np.sqrt(table.shape[1]))
    share = float((draws.argmax(axis=1) == winner).mean())
    return winner, share, (centre[winner] - half, centre[winner] + half)


def ours(world: World, table: np.ndarray, rng: np.random.Generator) -> tuple[int, float, tuple[float, float]]:
    """``results/posterior.py`` on one seed a trial."""
    count = len(table)
    return _best(posterior(Trials(table, np.arange(count), np.zeros(count, dtype=int), world.places)))


def _best(known: Posterior) -> tuple[int, float, tuple[float, float]]:
    winner = int(known.mean.argmax())
    return winner, float(known.probability_best[winner]), (float(known.low[winner]), float(known.high[winner]))


def confirmed(world: World, table: np.ndarray, rng: np.random.Generator) -> tuple[int, float, tuple[float, float]]:
    """``results/posterior.py`` with three new seeds of the three leaders; of all trials."""
    leaders = np.argsort(-table.mean(axis=1))[:3]
    extra = [world.run(int(leader), rng) for _ in range(3) for leader in leaders]
    point = np.concatenate([np.arange(len(table)), np.tile(leaders, 3)])
    seed = np.concatenate([np.zeros(len(table), dtype=int), np.repeat([1, 2, 3], 3)])
    return _best(posterior(Trials(np.concatenate([table, extra]), point, seed, world.places)))


Estimator = Callable[[World, np.ndarray, np.random.Generator], tuple[int, float, tuple[float, float]]]
ESTIMATORS: dict[str, Estimator] = {
    "bootstrap over pairs": bootstrap,
    "true seed variance": with_true_seeds,
    "Bayes-optimal": optimal,
    "ours": ours,
    "ours, after confirm 3 x 3": confirmed,
}


def simulate(sweeps: int, seed: int) -> dict[str, list[tuple[World, Statement]]]:
    """``sweeps`` of every size, number of pairs, spread over seeds and surface."""
    rng = np.random.default_rng(seed)
    said: dict[str, list[tuple[World, Statement]]] = {name: [] for name in ESTIMATORS}
    for trials in (8, 30):
        for pairs in (12, 48, 500):
            for ratio in RATIOS:
                for surface in SURFACES:
                    for _ in range(sweeps):
                        world = make_world(trials, pairs, ratio, surface, rng)
                        table = np.stack([world.run(trial, rng) for trial in range(trials)])
                        for name, estimate in ESTIMATORS.items():
                            winner, stated, bounds = estimate(world, table, rng)
                            best = winner == int(world.quality.argmax())
                            said[name].append((world, Statement(stated, best, bounds, world.quality[winner])))
    return said


def summarise(statements: list[Statement]) -> str:
    """``stated/true Brier``."""
    stated, true = (np.array([getattr(s, name) for s in statements], dtype=float) for name in ("stated", "is_best"))
    return f"{stated.mean():.2f}/{true.mean():.2f}  {((stated - true) ** 2).mean():.3f}"


def show(said: dict[str, list[tuple[World, Statement]]], console: Console) -> None:
    """Three tables: stated and true probabilities, reliability, coverage."""
    table = Table(title="Stated/true probability that the winner is the best trial, and Brier score", title_justify="left")
    for column in ("seeds vary by", *ESTIMATORS):
        table.add_column(column)
    for ratio in (*RATIOS, None):
        cells = [summarise([s for world, s in pairs if ratio is None or world.ratio == ratio]) for pairs in said.values()]
        table.add_row("all" if ratio is None else f"{ratio:g} x neighbours", *cells)
    console.print(table)

    table = Table(title="Reliability: of the statements in a bin, stated and true", title_justify="left")
    for column in ("stated", *ESTIMATORS):
        table.add_column(column)
    for low, high in ((0, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 0.95), (0.95, 1.01)):
        cells = []
        for pairs in said.values():
            chosen = [s for _, s in pairs if low <= s.stated < high]
            cells.append(
                f"{np.mean([s.stated for s in chosen]):.2f}/{np.mean([s.is_best for s in chosen]):.2f} ({len(chosen)})"
                if chosen
                else "-"
            )
        table.add_row(f"{low:.2f}-{min(high, 1):.2f}", *cells)
    console.print(table)

    table = Table(title="How often the winner's 95 % interval holds its quality", title_justify="left")
    for column in ("pairs", "seeds vary by", *ESTIMATORS):
        table.add_column(column)
    for count in (12, 48, 500):
        for ratio in RATIOS:
            cells = [
                f"{np.mean([s.covered for w, s in pairs if len(w.pair) == count and w.ratio == ratio]):.3f}"
                for pairs in said.values()
            ]
            table.add_row(str(count), f"{ratio:g}", *cells)
    table.add_row("all", "all", *(f"{np.mean([s.covered for _, s in pairs]):.3f}" for pairs in said.values()))
    console.print(table)


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", type=int, default=40, help="simulated sweeps of each of the 120 kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write all statements as JSON")
    options = parser.parse_args()
    begun = time.perf_counter()
    said = simulate(options.sweeps, options.seed)
    console = Console(width=150)
    show(said, console)
    console.print(f"{120 * options.sweeps} sweeps, {time.perf_counter() - begun:.0f} s")
    if options.out:
        rows = {name: [vars(s) | {"ratio": w.ratio} for w, s in pairs] for name, pairs in said.items()}
        options.out.write_text(json.dumps(rows, default=float))


if __name__ == "__main__":
    main()
