"""Does a sweep with emulated trials find the winner of an exhaustive grid, and from how many real trials?

    python benchmarks/emulator.py --out FOLDER [--rates 8] [--data PAIRS.jsonl] [--model smollm2-135m]

Runs a grid of 8 learning rates × 4 betas, one real trial each, then a sweep over the same points with
sweep.emulate=true. Both are resumed when the folder has them already. First table: what each found. Second: every point of
the grid emulated from the few trials of the second sweep, beside its real trial.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

import isaerft_sweep as isw
from isaerft_sweep.controller.emulated_search import read_anchor, recipe_of
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.search.emulator import Emulator

BETAS = [1.0, 2.0, 5.0, 20.0]
METRIC = "eval/log_odds_chosen"
CONSTRAINT = {"eval/kl_base": {"at_most": 0.15}}


def sweep_file(path: Path, method: str, rates: list[float]) -> Path:
    """A sweep over the grid's points."""
    content = {
        "method": method,
        "metric": {"name": METRIC, "goal": "maximize"},
        "constraints": CONSTRAINT,
        "run_cap": len(rates) * len(BETAS),
        "parameters": {"orpo.learning_rate": {"values": rates}, "orpo.beta": {"values": BETAS}},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def run(file: Path, options: list[str]) -> float:
    """Run or resume the sweep of a file beside it; processor seconds of all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "isaerft_sweep.launch", *options, "sweep=none", "tracker=disabled"]
    command += [f"name={file.stem}", f"sweep.file={file}", f"output={file.parent}"]
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def emulated(sweep: isw.Sweep, points: list[isw.Trial]) -> dict[str, np.ndarray]:
    """The metrics of the points, emulated from the sweep's trials."""
    anchors = [anchor for trial in sweep.trials if trial.rank and (anchor := read_anchor(TrialFolder(trial.path)))]
    emulator = Emulator(anchors)
    specs = [TrialFolder(point.path).read_spec().experiment for point in points]
    at = emulator.train([recipe_of(spec, emulator.steps) for spec in specs])
    return {name: emulator.metric(name).at(at) for name in (METRIC, *CONSTRAINT)}


def main() -> None:
    """Run both sweeps and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="pairs of your own instead of the package's")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rates", type=int, default=8, help="number of learning rates")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = ["data=builtin"] if args.data is None else ["data=jsonl", f"data.path={args.data}", "data.eval_size=48"]
    shared = [f"model={args.model}", *data, "data.test_size=0", "adapter=bias", "orpo=quick"]
    rates = [round(0.03 * 10 ** (i / (args.rates - 1)), 4) for i in range(args.rates)]
    seconds = {
        "grid": run(sweep_file(args.out / "grid.yaml", "grid", rates), [*shared, "orpo.eval_fraction=0.25"]),
        "emulated": run(
            sweep_file(args.out / "emulated.yaml", "bayes", rates), [*shared, "orpo.eval_fraction=0.5", "sweep.emulate=true"]
        ),
    }
    sweeps = {name: isw.load_sweep(args.out / name) for name in seconds}
    truth = {(t.params["orpo.learning_rate"], t.params["orpo.beta"]): t for t in sweeps["grid"].trials if t.rank}
    best = sweeps["grid"].best()
    console, table = Console(), Table(title=f"{METRIC}, {len(truth)} points", title_justify="left", box=None)
    for column in ("sweep", "real trials", "processor s", "winner (lr, beta)", "log odds", "behind the grid's"):
        table.add_column(column, justify="right")
    for name, sweep in sweeps.items():
        winner = sweep.best()
        value = winner.metrics[METRIC]
        table.add_row(
            name,
            str(sum(trial.rank is not None for trial in sweep.trials)),
            f"{seconds[name]:.0f}" if seconds[name] > 60 else "ran before",
            f"{winner.params['orpo.learning_rate']:.3g}, {winner.params['orpo.beta']:g}",
            f"{value:.4f}",
            f"{best.metrics[METRIC] - value:.4f}",
        )
    console.print(table)
    rest = list(truth.values())
    values = emulated(sweeps["emulated"], rest)
    errors = Table(title="All points, emulated from those trials", title_justify="left", box=None)
    for column in ("metric", "spread of the grid", "root mean square error", "largest", "Spearman"):
        errors.add_column(column, justify="right")
    for name, found in values.items():
        real = np.array([trial.metrics[name] for trial in rest])
        ranks = [np.argsort(np.argsort(v)) for v in (found, real)]
        off = found - real
        errors.add_row(
            name,
            f"{np.ptp(real):.3f}",
            f"{np.sqrt((off**2).mean()):.4f}",
            f"{np.abs(off).max():.4f}",
            f"{np.corrcoef(ranks)[0, 1]:.3f}",
        )
    console.print(errors)


if __name__ == "__main__":
    main()
