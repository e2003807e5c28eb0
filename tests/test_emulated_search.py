"""A sweep that emulates: few real trials, the grid's winner, the same after a restart; and when it must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, events
from helpers.toy_training import Toy

from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.controller import emulated_search
from isaerft_sweep.controller.build import make_sampler
from isaerft_sweep.controller.emulated_search import EmulatedSearch, recipe_of
from isaerft_sweep.errors import ConfigError
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.search.point import Point
from isaerft_sweep.specs import Experiment

FILE = """\
method: bayes
metric: {name: eval/log_odds_chosen, goal: maximize}
constraints: {eval/kl_base: {at_most: BOUND}}
run_cap: 30
parameters:
  orpo.learning_rate: {values: [0.03, 0.042, 0.058, 0.08, 0.11, 0.16, 0.22, 0.3]}
  orpo.beta: {values: [0.5, 1.0, 2.0, 5.0]}
"""
OPTIONS = ("orpo=quick", "sweep=none", "sweep.emulate=true", "adapter=bias")
STEPS = 24
Composed = Callable[..., Experiment]


class ToySweep:
    """Runs the points of a sweep with the toy; its trials record as real ones do."""

    def __init__(self, composed: Experiment, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.toy, self.experiment = Toy(), composed
        self.definition = to_definition(composed.sweep, composed)
        self.search = make_sampler(composed, self.definition, (), SweepFolder(folder))
        assert isinstance(self.search, EmulatedSearch)
        self.trained: dict[str, Any] = {}
        self.diverged: set[str] = set()

        def read(search: EmulatedSearch) -> None:
            search._anchors = {
                key: a for key, a in self.trained.items() if key in search._outcomes and key not in self.diverged
            }

        monkeypatch.setattr(EmulatedSearch, "_read_anchors", read)

    def train(self, point: Point) -> tuple[float, float]:
        """The point's metric, and how far it breaks the constraints."""
        if point.key not in self.trained:
            self.trained[point.key] = self.toy.train(recipe_of(self.experiment.with_params(point.params), STEPS))
        metrics = self.trained[point.key].evaluations[STEPS]
        return metrics["eval/log_odds_chosen"], self.definition.violation(metrics)

    def run(self, most: int) -> list[tuple[Point, float, float]]:
        """Trials until the source needs no more."""
        results = []
        while len(results) < most:
            gain = self.search.expected_gain()
            if gain is not None and gain.negligible is not None and gain.value < gain.negligible:
                break
            point = self.search.ask()
            assert point is not None
            value, violation = self.train(point)
            self.search.tell(point, value, violation)
            results.append((point, value, violation))
        return results


def sweep_of(composed: Composed, tmp_path: Path, *more: str, bound: float = 9.0) -> Experiment:
    path = tmp_path / "sweep.yaml"
    path.write_text(FILE.replace("BOUND", str(bound)))
    return composed("model=tiny", *OPTIONS, f"sweep.file={path}", *more)


@pytest.mark.parametrize("bound", [9.0, 0.2])
def test_few_trials_find_the_grids_winner(
    bound: float, experiment: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = ToySweep(sweep_of(experiment, tmp_path, bound=bound), tmp_path, monkeypatch)
    results = sweep.run(12)
    assert len(results) <= 11, "it knows when it has enough"
    found = max(value for _, value, violation in results if not violation)
    grid = [sweep.train(point) for point in sweep.search.source.grid_points()]
    allowed = [value for value, violation in grid if not violation]
    assert len(grid) == 32 and (bound == 9.0 or len(allowed) < 28), "the bound matters"
    assert found >= max(allowed) - 0.03 * (max(allowed) - min(allowed)), (found, max(allowed))
    assert any(point.note.startswith("emulated from") for point, _, _ in results)
    assert all("emulated" in point.note for point, _, _ in results[3:]), "or why not"


def test_after_a_restart_it_goes_on_alike(experiment: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    composed = sweep_of(experiment, tmp_path)
    sweep = ToySweep(composed, tmp_path, monkeypatch)
    results = sweep.run(5)
    again = make_sampler(composed, sweep.definition, (), SweepFolder(tmp_path))
    for point, value, violation in results:
        again.restore(point)
        again.tell(point, value, violation)
    for _ in range(2):  # the second while the first runs
        one, other = sweep.search.ask(), again.ask()
        assert one is not None and other is not None and one.key == other.key and one.note == other.note


def test_trials_at_the_same_time_are_different(
    experiment: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = ToySweep(sweep_of(experiment, tmp_path), tmp_path, monkeypatch)
    sweep.run(4)
    points = [sweep.search.ask() for _ in range(5)]
    assert len({point.key for point in points if point is not None}) == 5


def test_it_keeps_away_from_what_diverged(experiment: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = ToySweep(sweep_of(experiment, tmp_path), tmp_path, monkeypatch)
    first = sweep.search.ask()
    assert first is not None and first.params["orpo.learning_rate"] == 0.3
    sweep.diverged.add(first.key)
    sweep.search.tell(first, None)
    others = [point for point, _, _ in sweep.run(7)]
    near = [p for p in others[3:] if p.params == {**first.params, "orpo.learning_rate": 0.22}]
    assert not near


def test_where_it_is_wrong_the_usual_search_goes_on(
    experiment: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulated_search, "UNUSABLE", 1e-9)
    sweep = ToySweep(sweep_of(experiment, tmp_path), tmp_path, monkeypatch)
    results = sweep.run(8)
    assert len(results) == 8 and all("is too large beside the trials' spread" in point.note for point, _, _ in results[3:])
    assert sweep.search.expected_gain() is None


@pytest.mark.parametrize(
    ("options", "need"),
    [
        (("sweep.method=random",), "method bayes"),
        (("adapter=scale",), "adapter.kind bias, random, vector"),
        (("adapter=diffmean",), "adapter.kind"),
        (("adapter.top_k=4",), "adapter.top_k=null"),
        (("orpo.loss=dpo",), "orpo.loss=orpo"),
        (("orpo.optimizer=sgd",), "orpo.optimizer"),
        (("sweep.seeds=2",), "sweep.seeds=1"),
    ],
)
def test_what_cannot_be_emulated_is_refused(
    options: tuple[str, ...], need: str, experiment: Composed, tmp_path: Path
) -> None:
    composed = sweep_of(experiment, tmp_path, *options)
    with pytest.raises(ConfigError, match=f"sweep.emulate must go with {need}"):
        make_sampler(composed, to_definition(composed.sweep, composed), (), SweepFolder(tmp_path))


@pytest.mark.parametrize(
    ("constant", "need"),
    [
        ("orpo.loss: {value: dpo}", "orpo.loss=orpo, but got dpo"),
        ("adapter.kind: {value: scale}", "adapter.kind"),
        ("adapter.top_k: {value: 4}", "adapter.top_k=null, but got 4"),
        ("orpo.seed: {values: [1, 2]}", "parameters among .* but got orpo.seed"),
    ],
)
def test_what_the_file_sets_counts_too(constant: str, need: str, experiment: Composed, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(FILE.replace("BOUND", "9") + f"  {constant}\n")
    composed = experiment("model=tiny", *OPTIONS, f"sweep.file={path}")
    with pytest.raises(ConfigError, match=f"sweep.emulate must go with {need}"):
        make_sampler(composed, to_definition(composed.sweep, composed), (), SweepFolder(tmp_path))
    path.write_text(FILE.replace("BOUND", "9") + "  orpo.loss: {value: orpo}\n")
    composed = experiment("model=tiny", *OPTIONS, f"sweep.file={path}", "orpo.loss=dpo")
    make_sampler(composed, to_definition(composed.sweep, composed), (), SweepFolder(tmp_path))


def test_a_learning_rate_alone_has_three_first_points(experiment: Composed, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(FILE.replace("BOUND", "9").partition("  orpo.beta")[0])
    composed = experiment("model=tiny", *OPTIONS, f"sweep.file={path}")
    search = make_sampler(composed, to_definition(composed.sweep, composed), (), SweepFolder(tmp_path))
    points = [search.ask() for _ in range(3)]
    assert len({point.key for point in points if point}) == 3 == search.foreseeable


def test_where_all_trials_are_alike_nothing_is_emulated(
    experiment: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = ToySweep(sweep_of(experiment, tmp_path), tmp_path, monkeypatch)
    sweep.toy.gain = lambda v: 0.25  # type: ignore[method-assign]
    results = sweep.run(5)
    assert all("is the same in all trials" in point.note for point, _, _ in results[3:])


def test_a_trial_that_failed_leaves_its_neighbourhood_open(
    experiment: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = ToySweep(sweep_of(experiment, tmp_path), tmp_path, monkeypatch)
    sweep.run(4)
    running = sweep.search.ask()
    assert running is not None
    held = sweep.search.expected_gain()
    sweep.search.forget(running)
    free = sweep.search.expected_gain()
    assert held is not None and free is not None and free.value >= held.value


def test_metrics_that_contain_beta_are_made_of_those_that_do_not(
    experiment: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    parts = {"nll_loss": 2.0, "log_odds_ratio": -0.6, "logps/chosen": -1.5, "logps/rejected": -1.9}

    class Constant:
        def metric(self, name: str) -> Any:
            value = parts[name.removeprefix("eval/")]
            return type("At", (), {"at": lambda _self, at: np.full(len(at), value)})()

    betas = np.array([0.5, 2.0])
    at = np.zeros((2, 3))
    for name, expected in (
        ("eval/loss", [2.0 + 0.5 * 0.6, 2.0 + 2 * 0.6]),
        ("eval/rewards/margins", [0.5 * 0.4, 2 * 0.4]),
        ("eval/rewards/chosen", [-0.75, -3.0]),
    ):
        assert emulated_search._metric_at(Constant(), name, at, betas) == pytest.approx(expected)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_real_sweep_records_chooses_and_resumes(launch: Any, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(FILE.replace("BOUND", "9").replace("run_cap: 30", "run_cap: 5"))
    options = (
        *TINY,
        "orpo.eval_fraction=0.5",
        "sweep=none",
        "sweep.file=sweep.yaml",
        "sweep.emulate=true",
        "tracker=disabled",
    )
    done = launch(*options, "name=s", "launcher.slots=1")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "s"
    assert len(list(folder.glob("trials/*/gradients.npz"))) >= 4
    made = [event for event in events(folder) if event["event"] == "trial"]
    assert all("emulated" in event["note"] for event in made[3:]), "from three trials, or why not"
    assert "emulated" in done.stdout
    assert launch(*options, "name=s", "sweep.run_cap=6").returncode == 0
