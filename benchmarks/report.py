"""What a report costs: a made-up sweep of many trials with long curves, written as a page and pictures.

    python benchmarks/report.py [--trials 1000] [--points 1000]

The sweep's folder is made first and not timed. The report is what ``isaerft-sweep report`` runs, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from isaerft_sweep.journal.atomic_files import write_json, write_text
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.journal.layout import SweepFolder

SWEEP_FILE = """\
method: random
metric: {name: eval/log_odds_chosen, goal: maximize}
run_cap: 100000
parameters:
  orpo.learning_rate: {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-1}
  orpo.beta: {values: [0.5, 1.0, 2.0, 5.0]}
"""
TRAIN = ("loss", "grad_norm", "learning_rate", "epoch", "nll_loss", "log_odds_chosen", "log_odds_ratio", "rewards/chosen",
         "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "logits/chosen",
         "logits/rejected", "num_tokens")  # fmt: skip
EVAL = ("loss", "nll_loss", "log_odds_chosen", "rewards/accuracies", "rewards/margins")
LATENTS, HIDDEN, PAIRS = 16_384, 2_304, 100


def make_sweep(path: Path, trials: int, points: int, seed: int = 0) -> SweepFolder:
    """A folder as controller and workers leave it; one trial in twenty diverged."""
    rng = np.random.default_rng(seed)
    folder = SweepFolder(path)
    journal = Journal(folder)
    write_text(folder.definition, SWEEP_FILE)
    journal.write("sweep", sweep_id="s1234567", question="q", metric="eval/log_odds_chosen", goal="maximize")
    for index in range(trials):
        _make_trial(folder, journal, index, points, rng)
    journal.close()
    return folder


def _make_trial(folder: SweepFolder, journal: Journal, index: int, points: int, rng: np.random.Generator) -> None:
    u, beta = float(rng.random()), float(rng.choice([0.5, 1.0, 2.0, 5.0]))
    trial = folder.trial(f"run-made-up-{index}")
    trial.path.mkdir(parents=True)
    params = {"orpo.learning_rate": 1e-4 * 1000**u, "orpo.beta": beta}
    point = {"params": params, "unit": {"orpo.learning_rate": u}}
    journal.write("trial", index=index, name=trial.path.name, run_id=f"r{index}", **point)
    journal.write("dispatch", index=index, attempt=1, job={})
    level = -0.1 + 0.3 * u * (2 - u) + 0.02 * beta
    rows = []
    for step in range(1, points + 1):
        values = 3 * np.exp(-2 * step / points) + rng.normal(0, 0.1, len(TRAIN))
        rows.append(
            {"step": step, "time": 1.0e9 + step, **{f"train/{n}": float(v) for n, v in zip(TRAIN, values, strict=True)}}
        )
        if step % max(1, points // 5) == 0:
            scores = level * step / points + rng.normal(0, 0.01, len(EVAL))
            rows.append(
                {"step": step, "time": 1.0e9 + step, **{f"eval/{n}": float(v) for n, v in zip(EVAL, scores, strict=True)}}
            )
    write_text(trial.metrics, "".join(json.dumps(row) + "\n" for row in rows))
    metrics = {name: value for name, value in rows[-1].items() if name.startswith("eval/")}
    diverged = index % 20 == 19
    state = "diverged" if diverged else "completed"
    write_json(trial.status, {"state": state, "attempt": 1, "metrics": metrics, "untrained": {}})
    answers = (rng.normal(-2, 0.5, (2, PAIRS)) + np.array([[level], [-level]])).clip(max=-0.01)
    names = [f"{i:016x}" for i in range(PAIRS)]
    trained = {"step": points, "pairs": names, "chosen": answers[0].tolist(), "rejected": answers[1].tolist()}
    write_json(trial.evaluation, {"trained": trained})
    moved, vector = rng.normal(0, 1e-3, LATENTS).astype("float32"), rng.normal(0, 1, HIDDEN).astype("float32")
    part = rng.dirichlet(np.ones(LATENTS)).astype("float32")
    site = {"layer": 20, "tokens": 2048, "d_sae": LATENTS, "neuronpedia_id": "gemma-2-2b/20-gemmascope-res-16k"}
    arrays = {"20.moved": moved, "20.vector": vector, "20.share": part, "20.before": part, "20.after": part}
    np.savez(trial.latents, sites=np.array(json.dumps([site])), **arrays)
    value = None if diverged else metrics["eval/log_odds_chosen"]
    message = "the loss rose to 1e4 at step 12. Try a smaller learning rate." if diverged else ""
    journal.write("end", index=index, state=state, metric=value, message=message, seconds=600.0, given_up=False)


def main() -> None:
    """Make, time, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--points", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_sweep(Path(scratch) / "sweep", args.trials, args.points)
        rows = sum(path.stat().st_size for path in folder.path.glob("trials/*/metrics.jsonl"))
        started = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "isaerft_sweep.cli", "report", str(folder.path)], check=True, stdout=subprocess.DEVNULL
        )
        wall_s = time.monotonic() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        page = (folder.path / "report.html").stat().st_size
    print("| trials | points | rows MB | wall s | processor s | peak MiB | page MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print(
        f"| {args.trials:,} | {args.points:,} | {rows / 1e6:.0f} | {wall_s:.1f} | {used.ru_utime + used.ru_stime:.1f} "
        f"| {used.ru_maxrss / 1024:.0f} | {page / 1e6:.1f} |"
    )


if __name__ == "__main__":
    main()
