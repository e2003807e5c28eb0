"""The demo sweep's trials as a user would run them today, and with each level of reuse switched on in turn.

    python benchmarks/throughput.py [--trials 8] [--steps 24] [--repeats 3] [--only "(i)" "resident"] [--sample 2]

Each row runs the same trials (same model, data, seed, steps, learning rates) one after another and reports processor
seconds, of the training steps alone too (forward and backward; wall seconds on a GPU), wall seconds, tokens trained on per
wall second, largest resident memory, on a GPU also the device's, and the metrics. It runs on the GPU when there is one:

    (i)   TRL's ORPOTrainer, the adapter as a forward hook with SAE encode, decode and error term
    (ii)  the same with the bias as x + b @ W_dec
    ours  a trial without reuse; with lean logits and groups of near length; with the activation cache; with both; with
          shared prompts too; all of it in one resident worker for all trials; in that worker 2 and 4 trials at a time; and
          the whole command with early stopping (8 trials at a time, 4 evaluations each, ASHA from the first, eta 3)

Up to the resident worker every trial has a process of its own, so that one costs what another does: ``--sample N`` runs N of
them and multiplies. The frozen layers' output is made once per sweep, by the first trial, which is counted once. The metrics
are the best trial's, which all rows should agree on. The table is printed after every repeat: the last one counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from isaerft_sweep.dispatch.job import importing

OFF = {"launcher.activation_cache_gb": "0", "launcher.lean_logits": "false", "launcher.share_prompts": "false"}
LEAN, CACHE, PROMPTS = (
    {"launcher.lean_logits": "true"},
    {"launcher.activation_cache_gb": "8"},
    {"launcher.share_prompts": "true"},
)
ALL = {**LEAN, **CACHE, **PROMPTS}
LEVELS = {
    "(i) TRL, hook with encode and decode": ("hook", {}),
    "(ii) TRL, x + b @ W_dec": ("vector", {}),
    "ours, no reuse": ("ours", OFF),
    "ours, lean logits": ("ours", {**OFF, **LEAN}),
    "ours, activation cache": ("ours", {**OFF, **CACHE}),
    "ours, both": ("ours", {**OFF, **LEAN, **CACHE}),
    "ours, and shared prompts": ("ours", ALL),
    "ours, all, resident worker": ("resident", ALL),
    "ours, all, 2 trials at a time": ("co-batched 2", ALL),
    "ours, all, 4 trials at a time": ("co-batched 4", ALL),
    "ours, all, early stopping": ("sweep", {**ALL, "orpo.eval_fraction": "0.25", "launcher.trials_per_pass": "8"}),
}
RATES = (0.3, 0.1, 0.05, 0.2, 0.15, 0.07, 0.25, 0.04)


def compose_experiment(overrides: list[str]) -> Any:
    """The demo's experiment with overrides."""
    from isaerft_sweep.config.compose import compose

    return compose(["tracker=disabled", *overrides])


def count_steps() -> list[tuple[float, int]]:
    """From now on every training step's seconds (of the processor, or of a GPU) and tokens are added to the result."""
    import torch
    from transformers import Trainer

    from isaerft_sweep.trial.train_loop import TrainLoop

    spent, original, own = [], Trainer.training_step, TrainLoop._step
    on_gpu = torch.cuda.is_available()

    def now() -> float:
        if not on_gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = sum(int(inputs[f"{side}_attention_mask"].sum()) for side in ("chosen", "rejected"))
        started = now()
        loss = original(self, model, inputs, *args, **kwargs)
        spent.append((now() - started, tokens))
        return loss

    def timed_steps(self: Any, *args: Any) -> Any:
        started, tokens = now(), self.recorder.tokens_seen
        metrics = yield from own(self, *args)
        spent.append((now() - started, self.recorder.tokens_seen - tokens))
        return metrics

    Trainer.training_step = timed  # type: ignore[method-assign]
    TrainLoop._step = timed_steps  # type: ignore[method-assign]
    return spent


def make_trial(experiment: Any, folder: Path, sweep: str) -> Any:
    """The folder of a trial that is ready to run."""
    from isaerft_sweep.controller.trial_factory import TrialFactory
    from isaerft_sweep.journal.layout import SweepFolder
    from isaerft_sweep.search.sampler import Point
    from isaerft_sweep.search.sweep_file import Metric, SweepDefinition

    definition = SweepDefinition("grid", Metric("eval/log_odds_chosen", "maximize"), {})
    factory = TrialFactory(experiment, definition, SweepFolder(folder / sweep), "bench", None)
    spec = factory.make(0, Point({}))
    trial = factory.folder.trial(spec.name)
    trial.begin_attempt(1)
    return trial


def metrics_of(trial: Any) -> dict[str, float]:
    """What a trial that has completed found."""
    assert trial.read_status().state == "completed", trial.read_status()
    metrics = trial.read_status().metrics
    tokens = metrics["train/num_tokens"]
    return {"log_odds": metrics["eval/log_odds_chosen"], "nll": metrics["eval/nll_loss"], "tokens": tokens}


def run_ours(experiment: Any, folder: Path, sweep: str, shared: Any) -> dict[str, float]:
    """One trial of this package."""
    from isaerft_sweep.trial.runner import run_trial

    trial = make_trial(experiment, folder, sweep)
    run_trial(trial, 1, shared)
    return metrics_of(trial)


def run_co_batched(rates: list[str], overrides: list[str], folder: Path, trials_per_pass: int) -> list[dict[str, float]]:
    """All trials in one worker, ``trials_per_pass`` at a time."""
    from isaerft_sweep.journal.worker_queue import Task, WorkerFolder
    from isaerft_sweep.trial.worker import serve_trials

    worker, trials = WorkerFolder(folder / "worker"), []
    for number, rate in enumerate(rates):
        trials.append(make_trial(compose_experiment([f"orpo.learning_rate={rate}", *overrides]), folder, f"s{number}"))
        worker.claim(Task(str(trials[-1].path), 1), room=None)
    worker.claim(Task(None), room=None)
    serve_trials(worker, trials_per_pass=trials_per_pass)
    return [metrics_of(trial) for trial in trials]


def run_sweep(rates: list[str], overrides: list[str], folder: Path) -> list[dict[str, float]]:
    """The whole command, controller included, with early stopping."""
    import yaml

    definition = {
        "method": "grid",
        "metric": {"name": "eval/log_odds_chosen", "goal": "maximize"},
        "parameters": {"orpo.learning_rate": {"values": [float(rate) for rate in rates]}},
        "early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 3},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
    command = [sys.executable, "-m", "isaerft_sweep.launch", "sweep=none", f"sweep.file={folder}/sweep.yaml", "name=s"]
    subprocess.run([*command, f"output={folder}", "tracker=disabled", *overrides], check=True, stdout=subprocess.DEVNULL)
    from isaerft_sweep.journal.layout import COMPLETED, TrialFolder

    trials = [TrialFolder(path) for path in sorted((folder / "s" / "trials").iterdir())]
    completed = [metrics_of(trial) for trial in trials if trial.read_status().state == COMPLETED]
    return [{**found, "tokens": 0} for found in completed]  # what the others were trained on is not known


def child(kind: str, rates: list[str], overrides: list[str], folder: Path) -> None:
    """Run the trials of ``rates`` and print what the best one found and what all cost."""
    started = time.perf_counter()
    steps: list[tuple[float, int]] = []
    if kind in ("ours", "resident") or kind.startswith("co-batched"):
        with importing():  # as our workers do
            import isaerft_sweep.trial.worker  # noqa: F401
    if kind == "sweep":
        results = run_sweep(rates, overrides, folder)
    elif kind.startswith("co-batched"):
        results = run_co_batched(rates, overrides, folder, int(kind.split()[1]))
    else:
        steps = count_steps()
        results = run_each(kind, rates, overrides, folder)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cost = {
        "cpu_s": sum(u.ru_utime + u.ru_stime for u in used),
        "wall_s": time.perf_counter() - started,
        "mem_gib": max(u.ru_maxrss for u in used) / 2**20,
        "step_s": sum(seconds for seconds, _ in steps),
        "tokens": sum(tokens for _, tokens in steps) or sum(found["tokens"] for found in results),
        "device_gib": device_gib(),
    }
    print(json.dumps({**max(results, key=lambda found: found["log_odds"]), **cost}))


def device_gib() -> float:
    """The most that this process has had allocated on the GPU; 0 without one."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def device_words() -> str:
    """The machine's description for the table's title."""
    import torch

    machine = f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, bfloat16, {machine}"
    return f"{machine}, float32"


def run_each(kind: str, rates: list[str], overrides: list[str], folder: Path) -> list[dict[str, float]]:
    """The trials one after the other in this process."""
    results, kept = [], None
    if kind == "resident":
        from isaerft_sweep.trial.worker import WorkerCache

        kept = WorkerCache()
    for number, rate in enumerate(rates):
        experiment = compose_experiment([f"orpo.learning_rate={rate}", *overrides])
        if kind in ("ours", "resident"):
            results.append(run_ours(experiment, folder, f"s{number}", kept))
        else:
            from by_hand import run_plain

            results.append(run_plain(experiment, folder, kind == "vector"))
    return results


def run_level(kind: str, options: dict[str, str], args: argparse.Namespace) -> dict[str, float]:
    """All trials of one level, one process each; sums of their costs."""
    trials = []
    rates = [str(rate) for rate in RATES[: args.trials]]
    apart = kind in ("hook", "vector", "ours")
    once = 1 if options.get("launcher.activation_cache_gb", "0") != "0" else 0  # trials that do more than the others
    if apart and args.sample:
        rates = rates[: args.sample + once]

    def of_all(what: str) -> float:
        """The sum over all trials, from those that were run."""
        values = [trial[what] for trial in trials]
        if not apart:
            return sum(values)
        return sum(values[:once]) + statistics.mean(values[once:] or values) * (args.trials - once)

    with tempfile.TemporaryDirectory() as scratch:
        for together in [[rate] for rate in rates] if apart else [rates]:
            overrides = [
                f"orpo.max_steps={args.steps}",
                f"data.train_size={args.steps * 4}",
                "orpo.eval_untrained=never",
                "orpo.eval_harm=false",  # TRL's rows measure neither harm nor test pairs
                "data.test_size=0",
                f"launcher.scratch={scratch}/activations",
                *(f"{k}={v}" for k, v in options.items()),
            ]
            command = [sys.executable, __file__, "--child", kind, scratch, ",".join(together), *overrides]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            trials.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return {
        "cpu_s": of_all("cpu_s"),
        "wall_s": of_all("wall_s"),
        "mem_gib": max(t["mem_gib"] for t in trials),
        "step_s": sum(t["step_s"] for t in trials) / (len(rates) * args.steps),
        "tokens": of_all("tokens"),
        "device_gib": max(t["device_gib"] for t in trials),
        **{key: max(trials, key=lambda t: t["log_odds"])[key] for key in ("log_odds", "nll")},
    }


def main() -> None:
    """Run every level ``--repeats`` times, interleaved, and print medians and ratios."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[4].split(","), sys.argv[5:], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sample", type=int, help="trials to run of those that have a process each; all by default")
    parser.add_argument("--only", nargs="*", default=[""], help="levels whose name holds one of these words")
    args = parser.parse_args()
    levels = {name: level for name, level in LEVELS.items() if any(word in name for word in args.only)}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in levels}
    for _ in range(args.repeats):
        for name, (kind, options) in levels.items():
            results[name].append(run_level(kind, options, args))
            print(f"{name}: {results[name][-1]['cpu_s']:.1f} processor s", file=sys.stderr, flush=True)
        Console(width=140).print(table_of(results, f"{args.trials} trials of {args.steps} steps, {device_words()}"))


def table_of(results: dict[str, list[dict[str, float]]], title: str) -> Table:
    """Medians over the repeats, and ratios to the first row."""
    table = Table(title=f"{title}, median of {len(next(iter(results.values())))}")
    for column in (
        "",
        "processor s",
        "ratio",
        "a step",
        "ratio",
        "wall s",
        "tokens/s",
        "peak GiB",
        "GPU GiB",
        "log odds",
        "NLL",
    ):
        table.add_column(column, justify="left" if not column else "right")
    first = {key: statistics.median(r[key] for r in next(iter(results.values()))) for key in ("cpu_s", "step_s")}
    for name, runs in results.items():
        middle = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        table.add_row(
            name,
            f"{middle['cpu_s']:.1f}",
            f"{first['cpu_s'] / middle['cpu_s']:.2f}×",
            f"{middle['step_s']:.2f}" if middle["step_s"] else "",
            f"{first['step_s'] / middle['step_s']:.2f}×" if middle["step_s"] else "",
            f"{middle['wall_s']:.1f}",
            f"{middle['tokens'] / middle['wall_s']:.0f}" if middle["tokens"] else "",
            f"{middle['mem_gib']:.2f}",
            f"{middle['device_gib']:.2f}" if middle["device_gib"] else "",
            f"{middle['log_odds']:.4f}",
            f"{middle['nll']:.4f}",
        )
    return table


if __name__ == "__main__":
    main()
