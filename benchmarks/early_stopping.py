"""How much early stopping saves, and how often it loses the best trial, on recorded curves.

    python benchmarks/early_stopping.py                 # simulate on benchmarks/data/curves.json
    python benchmarks/early_stopping.py --record 24     # first train that many trials of the demo's model, evaluated 8 times

Every row runs the recorded trials in many random orders, one after another and eight at a time, as a sweep would, and
counts the evaluations that were computed. The best trial is the one with the best last value; it is lost when it was
stopped. W&B's hyperband is written from its own definition (top 1/eta of the values at the bracket, the trial's best value
counts, nobody comes back).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from isaerft_sweep.search.pruning import Curves, MedianRule, Pruner, SuccessiveHalving

RECORDED = Path(__file__).parent / "data" / "curves.json"
EVALUATIONS = 8
ORDERS = 300


class WandbHyperband(Pruner):
    """W&B's rule at the brackets ``rungs``."""

    def __init__(self, rungs: list[int], eta: float) -> None:
        self.rungs, self.eta = rungs, eta

    def stops(self, index: int, curves: Curves, since: int = 0) -> bool:
        reached = [rung for rung in self.rungs if rung <= len(curves[index])]
        if not reached:
            return False
        values = sorted((curve[reached[-1] - 1] for curve in curves.values() if len(curve) >= reached[-1]), reverse=True)
        return max(curves[index]) < values[int(len(values) / self.eta)]


class Never(Pruner):
    """Stops nobody."""

    def stops(self, index: int, curves: Curves, since: int = 0) -> bool:
        return False


RULES: dict[str, Callable[[], Pruner]] = {
    "none": Never,
    "ASHA, from evaluation 1, eta 2": lambda: SuccessiveHalving([1, 2, 4], 2),
    "ASHA, from evaluation 1, eta 3": lambda: SuccessiveHalving([1, 3], 3),
    "ASHA, from evaluation 2, eta 3": lambda: SuccessiveHalving([2, 6], 3),
    "W&B hyperband, min_iter 1, eta 3": lambda: WandbHyperband([1, 3], 3),
    "W&B hyperband, min_iter 2, eta 3": lambda: WandbHyperband([2, 6], 3),
    "median rule, from evaluation 2": lambda: MedianRule(2),
}


def simulate(curves: list[list[float]], pruner: Pruner, order: np.ndarray, slots: int) -> tuple[int, bool]:
    """Evaluations computed, and whether the best trial was run to its end."""
    seen: dict[int, list[float]] = {}
    stopped: set[int] = set()
    waiting, running = [int(i) for i in order], []
    while True:
        while len(running) < slots:
            again = pruner.revived(stopped, seen)
            if again is not None:
                stopped.discard(again)
                running.append(again)
            elif waiting:
                running.append(waiting.pop(0))
            else:
                break
        if not running:
            break
        for index in list(running):
            seen.setdefault(index, []).append(curves[index][len(seen.get(index, []))])
            over = len(seen[index]) == len(curves[index])
            if over or pruner.stops(index, seen, len(seen[index]) - 1):
                running.remove(index)
                if not over:
                    stopped.add(index)
    best = max(range(len(curves)), key=lambda i: curves[i][-1])
    return sum(map(len, seen.values())), len(seen[best]) == len(curves[best])


def record(trials: int) -> None:
    """Train quasi-random points of the demo's space and keep the metric at each evaluation."""
    from hydra import compose, initialize_config_dir

    from isaerft_sweep.config.boundary import to_definition, to_experiment
    from isaerft_sweep.config.schema import register
    from isaerft_sweep.controller.trial_factory import TrialFactory
    from isaerft_sweep.journal.layout import SweepFolder
    from isaerft_sweep.paths import folder
    from isaerft_sweep.search.sampler import Sampler
    from isaerft_sweep.trial.runner import run_trial
    from isaerft_sweep.trial.worker import WorkerCache

    register()
    settings = [
        f"orpo.eval_fraction={1 / EVALUATIONS}",
        "data.eval_size=32",
        "orpo.eval_untrained=never",
        "tracker=disabled",
    ]
    with initialize_config_dir(str(folder("conf")), version_base="1.3"):
        experiment = to_experiment(compose("config", settings))
    definition = to_definition(experiment.sweep, experiment)
    sampler, kept, found = Sampler(definition.parameters, "random"), WorkerCache(), []
    with tempfile.TemporaryDirectory() as output:
        factory = TrialFactory(experiment, definition, SweepFolder(Path(output) / "s"), "s", None)
        for index in range(trials):
            point = sampler.ask()
            assert point is not None
            trial = factory.folder.trial(factory.make(index, point).name)
            trial.begin_attempt(1)
            run_trial(trial, 1, kept)
            values = [row[definition.metric.name] for row in trial.read_metrics() if definition.metric.name in row]
            found.append({"params": dict(point.params), "values": values})
    RECORDED.write_text(json.dumps({"metric": definition.metric.name, "trials": found}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Record if asked, then simulate and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=int, metavar="TRIALS")
    args = parser.parse_args()
    if args.record:
        record(args.record)
    kept = json.loads(RECORDED.read_text(encoding="utf-8"))
    curves = [trial["values"] for trial in kept["trials"]]
    whole = sum(map(len, curves))
    table = Table(title=f"{len(curves)} recorded trials of {len(curves[0])} evaluations, {ORDERS} orders, {kept['metric']}")
    for name in ("rule", "computed, one at a time", "best lost", "computed, eight at a time", "best lost"):
        table.add_column(name, justify="left" if name == "rule" else "right")
    for name, make in RULES.items():
        cells = []
        for slots in (1, 8):
            rng = np.random.default_rng(0)
            results = [simulate(curves, make(), rng.permutation(len(curves)), slots) for _ in range(ORDERS)]
            cells += [f"{np.mean([n for n, _ in results]) / whole:.0%}", f"{np.mean([not kept for _, kept in results]):.1%}"]
        table.add_row(name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
