"""How near each sampler comes to the optimum of noisy surfaces after 12, 20 and 30 trials.

    python benchmarks/regret.py [--seeds 50] [--parallel 1 8]

Each surface is scaled to the range 0 to 1; an outcome has noise of 2 % of it. Regret: 100 times the distance from the
optimum of the best point's true value so far, median over seeds. "8 at a time": eight points run, the next is asked when one
ends. Columns: scrambled Sobol points (ours, ``random``), Optuna's multivariate TPE (ours for many parameters), Optuna's
GPSampler, and ``bayes``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

from isaerft_sweep.search.distributions import Distribution, Numeric
from isaerft_sweep.search.sampler import Point, Sampler, _Tpe

NOISE = 0.02
SHOWN = (12, 20, 30)
Surface = Callable[[np.ndarray], float]


def ridge(x: np.ndarray) -> float:
    """A ridge across both parameters, with a cliff beyond it."""
    along = x[0] + 0.6 * x[1]
    return -1.5 if along > 1.15 else float(-4 * (along - 0.9) ** 2 + 0.3 * x[1])


def edge(x: np.ndarray) -> float:
    """Rises to a corner, as log odds do with learning rate and beta."""
    return float(x[0] + 0.3 * x[1] + 0.4 * x[0] * x[1])


def banana(x: np.ndarray) -> float:
    """Rosenbrock's valley, on a logarithmic scale."""
    a, b = 4 * x[0] - 2, 4 * x[1] - 1
    return float(-np.log1p((1 - a) ** 2 + 100 * (b - a * a) ** 2))


def four(x: np.ndarray) -> float:
    """Four parameters, two of which matter little."""
    return float(np.exp(-((x[0] - 0.7) ** 2 + (x[1] - 0.3) ** 2) / 0.1) + 0.1 * np.cos(3 * x[2]) - 0.05 * x[3])


def recorded() -> Surface:
    """The last values of ``data/curves.json``, interpolated over learning rate and beta on their logarithmic scales."""
    from scipy.interpolate import RBFInterpolator

    trials = json.loads((Path(__file__).parent / "data" / "curves.json").read_text())["trials"]
    logs = np.array([[math.log(t["params"][key]) for key in ("orpo.learning_rate", "orpo.beta")] for t in trials])
    low, high = logs.min(axis=0), logs.max(axis=0)
    values = np.array([t["values"][-1] for t in trials])
    surface = RBFInterpolator((logs - low) / (high - low), values, kernel="linear", smoothing=1e-3)
    return lambda x: float(surface(x[None])[0])


SURFACES: dict[str, tuple[Surface, int]] = {
    "ridge with a cliff": (ridge, 2),
    "edge": (edge, 2),
    "banana": (banana, 2),
    "four parameters": (four, 4),
    "recorded": (recorded(), 2),
}


class Asker(Protocol):
    """Gives points and learns values, larger is better."""

    def ask(self) -> Any: ...
    def tell(self, point: Any, value: float) -> None: ...
    def at(self, point: Any) -> np.ndarray: ...


class Ours:
    """Our sampler; ``tpe``: with Optuna's TPE also for few parameters."""

    def __init__(self, method: str, dimensions: int, seed: int, tpe: bool = False) -> None:
        self.space: Mapping[str, Distribution] = {f"x{i}": Numeric("uniform", 0.0, 1.0) for i in range(dimensions)}
        self.sampler = Sampler(self.space, method, seed)
        if tpe:
            self.sampler._model = _Tpe(self.space, seed)

    def ask(self) -> Point:
        """The next point."""
        point = self.sampler.ask()
        assert point is not None
        return point

    def tell(self, point: Point, value: float) -> None:
        """Its value."""
        self.sampler.tell(point, value)

    def at(self, point: Point) -> np.ndarray:
        """Its coordinates."""
        return np.array([point.params[key] for key in self.space])


class OptunaGp:
    """Optuna's GPSampler, which needs torch."""

    def __init__(self, dimensions: int, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore")
        self.study = optuna.create_study(direction="maximize", sampler=optuna.samplers.GPSampler(seed=seed))
        self.space = {f"x{i}": optuna.distributions.FloatDistribution(0.0, 1.0) for i in range(dimensions)}

    def ask(self) -> Any:
        """The next point."""
        return self.study.ask(self.space)

    def tell(self, point: Any, value: float) -> None:
        """Its value."""
        self.study.tell(point, value)

    def at(self, point: Any) -> np.ndarray:
        """Its coordinates."""
        return np.array([point.params[key] for key in self.space])


SAMPLERS: dict[str, Callable[[int, int], Asker]] = {
    "Sobol": lambda dimensions, seed: Ours("random", dimensions, seed),
    "Optuna TPE": lambda dimensions, seed: Ours("bayes", dimensions, seed, tpe=True),
    "Optuna GPSampler": OptunaGp,
    "ours, bayes": lambda dimensions, seed: Ours("bayes", dimensions, seed),
}


def regrets(
    asker: Asker, surface: Surface, scale: tuple[float, float], parallel: int, rng: np.random.Generator
) -> list[float]:
    """The regret after each of 30 trials, of the range of the surface."""
    low, high = scale
    running: list[Any] = []
    best, found = -math.inf, []
    while len(found) < SHOWN[-1]:
        while len(running) < parallel:
            running.append(asker.ask())
        point = running.pop(0)
        value = surface(asker.at(point))
        asker.tell(point, value + NOISE * (high - low) * float(rng.standard_normal()))
        best = max(best, value)
        found.append(100 * (high - best) / (high - low))
    return found


def range_of(surface: Surface, dimensions: int) -> tuple[float, float]:
    """Smallest and largest value, on 40,000 points and near the largest."""
    rng = np.random.default_rng(0)
    points = rng.random((40_000 if surface.__name__ != "<lambda>" else 4000, dimensions))
    corners = np.array(np.meshgrid(*[[0.0, 1.0]] * dimensions)).reshape(dimensions, -1).T
    points = np.concatenate([points, corners])
    values = np.array([surface(point) for point in points])
    near = np.clip(points[values.argmax()] + 0.02 * rng.standard_normal((2000, dimensions)), 0, 1)
    return float(values.min()), max(float(values.max()), *(surface(point) for point in near))


def main() -> None:
    """Run everything and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--parallel", type=int, nargs="*", default=[1, 8])
    options = parser.parse_args()
    table = Table(title=f"Median regret (% of the range) after {', '.join(map(str, SHOWN))} trials, {options.seeds} seeds")
    for column in ("surface", "at a time", *SAMPLERS):
        table.add_column(column)
    spent: dict[str, float] = dict.fromkeys(SAMPLERS, 0.0)
    for name, (surface, dimensions) in SURFACES.items():
        scale = range_of(surface, dimensions)
        for parallel in options.parallel:
            cells = []
            for sampler, make in SAMPLERS.items():
                begun = time.process_time()
                found = [
                    regrets(make(dimensions, seed), surface, scale, parallel, np.random.default_rng(seed))
                    for seed in range(options.seeds)
                ]
                spent[sampler] += time.process_time() - begun
                middle = np.median(found, axis=0)
                cells.append(" / ".join(f"{middle[n - 1]:.1f}" for n in SHOWN))
            table.add_row(name, str(parallel), *cells)
    sweeps = options.seeds * len(SURFACES) * len(options.parallel)
    table.add_row("processor s a sweep", "", *(f"{seconds / sweeps:.2f}" for seconds in spent.values()))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
