"""Chooses the next point: grid, quasi-random, Gaussian process or TPE. A pure function of space, history and seed.

Points live on the unit cube (see ``distributions``). ``random`` takes scrambled Sobol points, which cover the cube more
evenly than independent draws. ``bayes`` starts with them, then asks a Gaussian process (``gaussian_process.py``); for more
than ``MOST_PARAMETERS`` parameters, or several goals, Optuna's multivariate TPE, with the pending points counted as bad
(constant liar), so that parallel trials spread. No point repeats without ``sweep.repeats``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from isaerft_sweep.errors import SpaceError
from isaerft_sweep.search.distributions import Categorical, Conditional, Constant, Distribution, Numeric, cases_of, resolved
from isaerft_sweep.search.gaussian_process import MOST_PARAMETERS, GaussianProcessModel
from isaerft_sweep.search.point import Point as Point

if TYPE_CHECKING:
    import optuna

BLOCK = 1024
INFEASIBLE = 1e12
"""Larger than any metric."""
STARTUP = {"gp": 6, "tpe": 5}
"""Outcomes before the first model-based point: with fewer, a model's points would be less even than quasi-random ones."""
MOST_SHUFFLED = 1_000_000
"""Points of a grid whose order is a permutation in memory."""
ATTEMPTS = 200
"""Draws that may repeat a tried point before the untried points are listed."""


@dataclass(frozen=True)
class Gain:
    """By how much another trial is expected to better the metric, in its units. ``negligible``: below which a source that
    knows its own error needs no further trial."""

    value: float
    negligible: float | None = None


class PointSource(Protocol):
    """Gives the controller points and learns their outcomes.

    ``size``: the number of different points. ``repeats``: whether a point may repeat. ``method``: for display.
    """

    method: str
    repeats: bool

    @property
    def size(self) -> float: ...

    @property
    def foreseeable(self) -> float:
        """How many of the first points depend on no outcome."""

    def ask(self) -> Point | None:
        """The next point, now pending; None when every point has been tried."""

    def tell(self, point: Point, value: float | None, violation: float = 0.0, others: Sequence[float] = ()) -> None:
        """Learn the outcome of a pending point.

        Args:
            point: as ``ask`` gave it.
            value: the metric; None for a trial that diverged.
            violation: how far it breaks the sweep's constraints; see ``search/constraints.py``.
            others: the values of further goals, larger is better.
        """

    def expected_gain(self) -> Gain | None:
        """By how much another trial is expected to better the metric; None where the source has no model of it."""

    def forget(self, point: Point) -> None:
        """A pending point has no outcome: its trial failed for a reason unrelated to the point."""

    def restore(self, point: Point) -> None:
        """Count a point of an earlier process as pending."""

    def pending_again(self, point: Point) -> None:
        """A point with an outcome, or a forgotten one, is pending again."""


class FixedPoints:
    """The points of a list, in order, without those of an earlier process."""

    method, repeats = "given points", False

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = list(points)
        self.tried: set[str] = set()

    @property
    def size(self) -> float:
        """The number of different points, including those of an earlier process with another list."""
        return len(self.tried | {point.key for point in self.points})

    @property
    def foreseeable(self) -> float:
        return self.size

    def ask(self) -> Point | None:
        point = next((p for p in self.points if p.key not in self.tried), None)
        if point is not None:
            self.tried.add(point.key)
        return point

    def tell(self, point: Point, value: float | None, violation: float = 0.0, others: Sequence[float] = ()) -> None:
        """Nothing follows from it."""

    def expected_gain(self) -> Gain | None:
        """Unknown."""
        return None

    def forget(self, point: Point) -> None:
        """Nothing follows from it."""

    def restore(self, point: Point) -> None:
        self.tried.add(point.key)

    def pending_again(self, point: Point) -> None:
        """Nothing follows from it."""


class Sampler:
    """Gives points and learns their outcomes. After a restart ``restore`` rebuilds it, and it continues in the same way.

    Args:
        space: distributions by dotted config key.
        method: ``grid``, ``random`` or ``bayes``.
        seed: of the search.
        sign: +1 when more of the metric is better, −1 when less is.
        repeats: whether a point may come twice.
        goals: number of metrics.
    """

    def __init__(
        self,
        space: Mapping[str, Distribution],
        method: str,
        seed: int = 0,
        sign: int = 1,
        repeats: bool = False,
        goals: int = 1,
    ) -> None:
        self.space, self.method, self.seed, self.sign, self.repeats = dict(space), method, seed, sign, repeats
        self.tried: set[str] = set()
        self.count = 0
        self.goals = goals
        self._model = self._make_model() if method == "bayes" else None
        self._grid = self.grid_points() if method == "grid" else iter(())

    def _make_model(self) -> GaussianProcessModel | _Tpe:
        if self.goals == 1 and 0 < len(self.free) <= MOST_PARAMETERS:
            return GaussianProcessModel(self.space, self.seed)
        return _Tpe(self.space, self.seed, self.goals)

    def learn(self, sweeps: Sequence[Sequence[tuple[Point, float | None]]]) -> None:
        """Learn the results of earlier sweeps: points of this space with their values, None for those that went wrong.

        Raises SpaceError for a method without a model that can tell sweeps apart.
        """
        if not isinstance(self._model, GaussianProcessModel):
            raise SpaceError(
                f"sweep.prior must go with method bayes, one metric and 1 to {MOST_PARAMETERS} parameters, whose model can "
                f"tell sweeps apart, but the method is {self.method} with {len(self.free)} parameters."
            )
        self._model.learn([[(p, None if v is None else self.sign * v) for p, v in one] for one in sweeps])

    @property
    def free(self) -> list[str]:
        """The parameters that are not constant."""
        return [key for key, d in self.space.items() if not isinstance(d, Constant)]

    @cached_property
    def size(self) -> float:
        """The number of different points; infinite when a parameter is continuous."""
        return sum(math.prod(d.size for d in case.values()) for case in cases_of(self.space))

    @property
    def foreseeable(self) -> float:
        return max(1, STARTUP[self._model.kind] - self._model.outcomes) if self._model else math.inf

    def ask(self) -> Point | None:
        point = self._next_untried()
        if point is not None:
            self._note(point)
        return point

    def tell(self, point: Point, value: float | None, violation: float = 0.0, others: Sequence[float] = ()) -> None:
        if self._model is None:
            return
        if value is None:
            self._model.tell(point, None)
            return
        if isinstance(self._model, GaussianProcessModel):
            self._model.tell(point, [self.sign * value], violation)
            return
        # TPE looks at the order alone: a point that breaks a constraint is behind all others, by how far it does
        worst = -INFEASIBLE * (1 + min(violation, 1e6))
        self._model.tell(point, [worst] * self.goals if violation else [self.sign * value, *others])

    def expected_gain(self) -> Gain | None:
        if isinstance(self._model, GaussianProcessModel) and self._model.outcomes >= STARTUP[self._model.kind]:
            return Gain(self._model.expected_gain(self.count))
        return None

    def forget(self, point: Point) -> None:
        if self._model:
            self._model.forget(point)

    def restore(self, point: Point) -> None:
        self._note(point)

    def pending_again(self, point: Point) -> None:
        if self._model:
            self._model.add_pending(point)

    def _note(self, point: Point) -> None:
        self.tried.add(point.key)
        self.count += 1
        if self._model:
            self._model.add_pending(point)

    def _next_untried(self) -> Point | None:
        if self.method == "grid":
            return next((p for p in self._grid if p.key not in self.tried), None)
        if not self.repeats and len(self.tried) >= self.size:
            return None
        for attempt in range(ATTEMPTS):
            point = self._draw(self.count, attempt)
            if self.repeats or point.key not in self.tried:
                return point
        if self.size == math.inf:
            return None  # unbounded steps of which the draws repeat the tried ones
        left = [p for p in self.grid_points() if p.key not in self.tried]
        return left[np.random.default_rng([self.seed, self.count]).integers(len(left))]

    def _draw(self, number: int, attempt: int) -> Point:
        if self._model and self._model.outcomes >= STARTUP[self._model.kind] and attempt < ATTEMPTS // 4:
            return self.point_at(self._model.suggest(number, attempt))
        return self.quasi_random(number + attempt)

    def quasi_random(self, number: int) -> Point:
        """Point ``number`` of the quasi-random sequence."""
        row = _sobol(len(self.free), self.seed, number)
        return self.point_at(dict(zip(self.free, row, strict=True)))

    def point_at(self, unit: Mapping[str, float]) -> Point:
        """The point with these u by key; one that is left out is in the middle."""
        params = {key: d.at(unit.get(key, 0.5)) for key, d in self.space.items() if not isinstance(d, Conditional)}
        params = {key: d.at(unit.get(key, 0.5)) for key, d in resolved(self.space, params).items()}
        return Point(params, {key: float(u) for key, u in unit.items()})

    def grid_points(self) -> Iterator[Point]:
        """Yield every point, the last parameter varying fastest: a grid may be larger than the memory."""
        for case in cases_of(self.space):
            for number in range(math.prod(int(d.size) for d in case.values())):
                yield self._grid_point(case, number)

    def _grid_point(self, case: Mapping[str, Constant | Categorical | Numeric], number: int) -> Point:
        sizes = {key: int(d.size) for key, d in case.items()}
        choice: dict[str, int] = {}
        for key in reversed(sizes):
            number, choice[key] = divmod(number, sizes[key])
        params = {key: d.nth(choice[key]) for key, d in case.items()}
        unit = {key: (choice[key] + 0.5) / sizes[key] for key in self.free}
        unit |= {key: self._unit_of(key, value) for key, value in params.items() if self._is_parent(key)}
        return Point(params, unit)

    def _is_parent(self, key: str) -> bool:
        return any(isinstance(d, Conditional) and d.parent == key for d in self.space.values())

    def _unit_of(self, key: str, value: Any) -> float:
        """The u of a value of a list: the middle of its share."""
        choices = self.space[key].choices or ()
        return (choices.index(value) + 0.5) / len(choices)


class ShuffledGrid(Sampler):
    """A grid in random order: a part of it covers all values."""

    def grid_points(self) -> Iterator[Point]:
        rng, size = random.Random(self.seed), int(self.size)  # numpy's generators end at 2**63
        case = resolved(self.space, {})
        if size <= MOST_SHUFFLED:
            for number in rng.sample(range(size), size):
                yield self._grid_point(case, number)
            return
        seen: set[int] = set()  # of a huge grid a small part is run: independent draws hardly repeat
        while len(seen) < size:
            number = rng.randrange(size)
            if number not in seen:
                seen.add(number)
                yield self._grid_point(case, number)


def load_libraries() -> None:
    """Import what random and bayes need, which takes a second, before the first point needs it."""
    import scipy.optimize  # noqa: F401

    _sobol_block(1, 0, 0)


def _sobol(dimensions: int, seed: int, index: int) -> list[float]:
    """Row ``index`` of the scrambled Sobol sequence of ``seed`` (Owen 1998), from scipy."""
    return _sobol_block(dimensions, seed, index // BLOCK)[index % BLOCK] if dimensions else []


@lru_cache(maxsize=4)
def _sobol_block(dimensions: int, seed: int, block: int) -> list[list[float]]:
    """``BLOCK`` rows at a time: fast-forwarding to a single row costs more with every trial."""
    from scipy.stats import qmc

    engine = qmc.Sobol(dimensions, scramble=True, rng=np.random.default_rng(seed))
    if block:
        engine.fast_forward(block * BLOCK)
    rows: list[list[float]] = engine.random(BLOCK).tolist()
    return rows


class _Tpe:
    """Optuna's TPE on the unit cube, with categorical parameters by their index. Larger is better."""

    kind = "tpe"

    def __init__(self, space: Mapping[str, Distribution], seed: int, goals: int = 1) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.seed, self.space = seed, space
        self.goals = goals
        self.study = optuna.create_study(directions=["maximize"] * goals)
        self.pending: dict[str, list[int]] = {}
        self.outcomes = 0
        self.distributions: dict[str, optuna.distributions.BaseDistribution] = {}
        for key, d in space.items():
            if isinstance(d, Categorical):
                self.distributions[key] = optuna.distributions.CategoricalDistribution(tuple(range(len(d.values))))
            elif not isinstance(d, Constant):
                self.distributions[key] = optuna.distributions.FloatDistribution(0.0, 1.0)

    def suggest(self, number: int, attempt: int) -> dict[str, float]:
        """The next point on the unit cube, by key. Leaves no pending trial in the study."""
        import optuna

        seed = int(np.random.SeedSequence([self.seed, number, attempt]).generate_state(1)[0])
        self.study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=1)
        trial = self.study.ask(self.distributions)
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return {key: self._unit(key, value) for key, value in trial.params.items()}

    def add_pending(self, point: Point) -> None:
        import optuna

        params = {key: self._native(key, u) for key, u in point.unit.items()}
        self.study.enqueue_trial(params)
        self.study.sampler = optuna.samplers.RandomSampler(seed=0)
        number = self.study.ask(self.distributions).number
        self.pending.setdefault(point.key, []).append(number)

    def tell(self, point: Point, values: Sequence[float] | None) -> None:
        numbers = self.pending.get(point.key)
        if numbers:
            # -inf: a diverged point ranks last, and TPE uses ranks only
            self.study.tell(numbers.pop(), [-math.inf] * self.goals if values is None else list(values))
            self.outcomes += 1

    def forget(self, point: Point) -> None:
        import optuna

        numbers = self.pending.get(point.key)
        if numbers:
            self.study.tell(numbers.pop(), state=optuna.trial.TrialState.FAIL)

    def _unit(self, key: str, value: Any) -> float:
        """Optuna's value as u in [0, 1]: for a category, the middle of its share of probability."""
        d = self.space[key]
        if not isinstance(d, Categorical):
            return float(value)
        before = sum(d.probabilities[: int(value)])
        return before + d.probabilities[int(value)] / 2

    def _native(self, key: str, u: float) -> Any:
        d = self.space[key]
        return d.values.index(d.at(u)) if isinstance(d, Categorical) else u
