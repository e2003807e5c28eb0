"""What a search learns from earlier sweeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.sweeps import make_sweep

from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.controller.build import make_sampler
from isaerft_sweep.controller.prior import prior_results, summary
from isaerft_sweep.errors import ConfigError, FolderError, SpaceError
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.search.sampler import Point, Sampler
from isaerft_sweep.search.start_points import point_in
from isaerft_sweep.search.sweep_file import read_parameters
from isaerft_sweep.specs import Experiment

SPACE = read_parameters(
    {"orpo.learning_rate": {"min": 0.0, "max": 1.0}, "orpo.gamma": {"distribution": "uniform", "min": 0.0, "max": 1.0}}
)


def value(params: Mapping[str, Any]) -> float:
    """Best at (0.3, 0.7), which a quasi-random start does not hit."""
    return -((params["orpo.learning_rate"] - 0.3) ** 2) - 2 * (params["orpo.gamma"] - 0.7) ** 2


def earlier(shift: float, trials: int = 15) -> list[tuple[Point, float | None]]:
    """A random sweep of nearly the same surface, all values ``shift`` higher; a trial of it has diverged."""
    source, results = Sampler(SPACE, "random", 5), []
    for _ in range(trials):
        point = source.ask()
        assert point is not None
        results.append((point, value(point.params) + shift))
    return [*results, (point_in(SPACE, {"orpo.learning_rate": 0.99, "orpo.gamma": 0.0}, lambda _: 0), None)]


def best_of_first(trials: int, prior: list[list[tuple[Point, float | None]]], seed: int) -> float:
    source = Sampler(SPACE, "bayes", seed)
    if prior:
        source.learn(prior)
    values = []
    for _ in range(trials):
        point = source.ask()
        assert point is not None
        values.append(value(point.params))
        source.tell(point, values[-1])
    return max(values)


def test_a_search_that_has_learned_begins_near_the_best() -> None:
    for shift in (0.0, 100.0, -3.0):  # another data set may raise all values alike
        learned = [best_of_first(3, [earlier(shift)], seed) for seed in range(5)]
        alone = [best_of_first(3, [], seed) for seed in range(5)]
        assert min(learned) > -0.02 and sum(learned) > 0.3 * sum(alone), (shift, learned, alone)


def test_a_misleading_sweep_is_outweighed_by_own_results() -> None:
    wrong = [(point, None if v is None else -v) for point, v in earlier(0.0)]
    assert min(best_of_first(14, [wrong], seed) for seed in range(3)) > -0.02


def test_learned_results_do_not_depend_on_a_restart() -> None:
    def run(known: list[Point]) -> list[Point]:
        source = Sampler(SPACE, "bayes", 1)
        source.learn([earlier(0.5)])
        points = []
        for number in range(6):
            point = known[number] if number < len(known) else source.ask()
            assert point is not None
            if number < len(known):
                source.restore(point)
            source.tell(point, value(point.params))
            points.append(point)
        return points

    whole = run([])
    assert run(whole[:4]) == whole


def test_only_the_gaussian_process_learns() -> None:
    with pytest.raises(SpaceError, match="must go with method bayes, one metric and 1 to 6 parameters"):
        Sampler(SPACE, "random").learn([earlier(0.0)])


def test_a_folder_is_read_once(tmp_path: Path, experiment: Callable[..., Experiment]) -> None:
    other = make_sweep(tmp_path / "other", trials=9)
    file = tmp_path / "s.yaml"
    file.write_text(
        "method: bayes\nmetric: {name: eval/log_odds_chosen, goal: maximize}\nrun_cap: 5\nparameters:\n"
        "  orpo.learning_rate: {distribution: log_uniform_values, min: 1.0e-4, max: 0.1}\n  orpo.beta: {values: [0.1, 0.2, 0.4]}\n"
    )
    composed = experiment("sweep=none", f"sweep.file={file}", f"sweep.prior=[{other.path}]")
    definition = to_definition(composed.sweep, composed)
    mine = SweepFolder(tmp_path / "mine")
    (results,) = prior_results(mine, composed, definition)
    assert len(results) == 9 and summary([results], composed.sweep.prior) == [
        f"learns from {len(results)} trials of {other.path}"
    ]
    for point, known in results:
        status = next(
            status
            for path in other.path.glob("trials/*/status.json")
            if (status := json.loads(path.read_text()))["metrics"]["eval/log_odds_chosen"] == known
        )
        assert status and set(point.params) == set(definition.parameters) == set(point.unit)
    learned, alone = make_sampler(composed, definition, [results]).ask(), make_sampler(composed, definition).ask()
    assert learned is not None and alone is not None and learned.key != alone.key
    for path in other.path.glob("trials/*/status.json"):
        path.unlink()
    assert prior_results(mine, composed, definition) == [results], "as it was, whatever becomes of the other sweep"


def test_a_sweep_without_anything_to_learn_is_an_error(tmp_path: Path, experiment: Callable[..., Experiment]) -> None:
    other = make_sweep(tmp_path / "other")
    composed = experiment("sweep=quick", f"sweep.prior=[{other.path}]")
    with pytest.raises(ConfigError, match="must have a completed trial with eval/log_odds_chosen in this sweep's space"):
        prior_results(None, composed, to_definition(composed.sweep, composed))
    composed = experiment("sweep=quick", f"sweep.prior=[{tmp_path}/nowhere]")
    with pytest.raises(FolderError):
        prior_results(None, composed, to_definition(composed.sweep, composed))
