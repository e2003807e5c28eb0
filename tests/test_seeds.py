"""sweep.seeds: good points run again with new seeds, bad ones stay with one."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from conftest import TINY, events
from hypothesis import given, settings
from hypothesis import strategies as st

from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.config.compose import compose
from isaerft_sweep.controller.build import make_sampler
from isaerft_sweep.controller.static_array import create_static_trials
from isaerft_sweep.errors import ConfigError
from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.search.distributions import Categorical, Numeric
from isaerft_sweep.search.sampler import Point, Sampler
from isaerft_sweep.search.seeded import SEED, SeededPoints, without_seed

SPACE = {"x": Numeric("uniform", 0, 1)}


def source(method: str = "random", seeds: int = 3) -> SeededPoints:
    return SeededPoints(Sampler(SPACE, method), seeds, first=42, sign=1)


def value_of(point: Point) -> float:
    return -abs(point.params["x"] - 0.5) + 0.001 * point.params[SEED]


def test_only_the_better_half_gets_further_seeds() -> None:
    points, given_out = source(), []
    for _ in range(60):
        point = points.ask()
        assert point is not None
        given_out.append(point)
        points.tell(point, value_of(point))
    seeds: dict[float, list[int]] = {}
    for point in given_out:
        seeds.setdefault(point.params["x"], []).append(point.params[SEED])
    assert all(found == list(range(42, 42 + len(found))) for found in seeds.values()), "in order, none twice"
    counts = Counter(len(found) for found in seeds.values())
    assert counts[1] >= len(seeds) / 3 and counts[3] >= 3 and max(counts) == 3
    best = min(seeds, key=lambda x: abs(x - 0.5))
    worst = max(seeds, key=lambda x: abs(x - 0.5))
    assert len(seeds[best]) == 3 and len(seeds[worst]) == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["ask", "ok", "diverged", "failed", "restart"]), max_size=60),
    st.sampled_from(["random", "bayes"]),
)
def test_whatever_happens_no_run_is_given_twice_and_a_restart_goes_on(steps: list[str], method: str) -> None:
    points, pending, ended, order = source(method), [], {}, []
    for step in steps:
        if step == "ask":
            point = points.ask()
            assert point is not None and point.key not in ended and point.key not in {p.key for p in pending}
            assert 42 <= point.params[SEED] <= 44
            pending.append(point)
            order.append(point)
        elif step == "restart":
            points = source(method)
            for point in order:
                points.restore(point)
                if point.key in ended:
                    outcome = ended[point.key]
                    points.forget(point) if outcome == "failed" else points.tell(point, outcome)
        elif pending:
            point = pending.pop(0)
            if step == "failed":
                points.forget(point)
                ended[point.key] = "failed"
            else:
                ended[point.key] = value_of(point) if step == "ok" else None
                points.tell(point, ended[point.key])


def test_a_race_through_a_grid_ends_by_itself() -> None:
    space = {"x": Categorical(tuple(range(8)), (1 / 8,) * 8)}
    points, runs = SeededPoints(Sampler(space, "grid"), 3, first=42, sign=1), []
    assert points.size == 24
    while (point := points.ask()) is not None:
        runs.append(point)
        points.tell(point, float(point.params["x"]))
    assert 8 + 4 + 2 <= len(runs) < 24 and Counter(p.params["x"] for p in runs)[7] == 3


def test_a_trial_that_breaks_a_constraint_earns_no_seed() -> None:
    points = source()
    first = [points.ask() for _ in range(4)]
    for number, point in enumerate(first):
        assert point is not None
        points.tell(point, float(number), violation=1.0 if number == 3 else 0.0)
    promoted = points.ask()
    assert promoted is not None and first[2] is not None
    assert without_seed(promoted.params) == without_seed(first[2].params) and promoted.params[SEED] == 43


def test_what_does_not_go_with_it(tmp_path) -> None:
    options = [*TINY, "sweep=reference", "sweep.run_cap=4", "sweep.seeds=2", f"output={tmp_path}"]
    experiment = compose(options)
    assert isinstance(make_sampler(experiment, to_definition(experiment.sweep, experiment)), SeededPoints)
    with pytest.raises(ConfigError, match=r"must not go with sweep.repeats"):
        repeating = compose([*options, "sweep.repeats=true"])
        make_sampler(repeating, to_definition(repeating.sweep, repeating))
    with pytest.raises(ConfigError, match="trials can be made ahead only with one seed a point"):
        create_static_trials(compose([*options, "sweep.method=random"]), options)
    with pytest.raises(ConfigError, match=r"sweep.seeds must be at least 1"):
        compose([*options, "sweep.seeds=0"])


@pytest.mark.slow
def test_a_real_sweep_with_seeds(launch, tmp_path) -> None:
    command = [
        *TINY,
        "sweep=reference",
        "sweep.method=random",
        "sweep.run_cap=6",
        "sweep.seeds=2",
        "tracker=disabled",
        "name=s",
    ]
    done = launch(*command, "launcher.slots=1")
    assert done.returncode == 0, done.stderr
    params = [e["params"] for e in events(tmp_path / "outputs" / "s") if e["event"] == "trial"]
    points = Counter(without_seed(p) for p in params)
    assert len(params) == 6 and sorted(points.values()) in ([1, 1, 2, 2], [1, 1, 1, 1, 2])
    sweep = read_sweep_folder(tmp_path / "outputs" / "s")
    assert sweep.seeds_known and math.isfinite(sweep.seed_sd or math.nan)
    assert "seed" in done.stdout and "expected" in done.stdout
