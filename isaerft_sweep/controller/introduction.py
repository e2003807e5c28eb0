"""The summary that a sweep prints before its first trial."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console

from isaerft_sweep.controller.build import evaluations_per_trial
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.search.pruning import rungs
from isaerft_sweep.search.sampler import PointSource
from isaerft_sweep.search.sweep_file import SweepDefinition
from isaerft_sweep.specs import Experiment


def introduction(
    folder: SweepFolder, experiment: Experiment, definition: SweepDefinition, sampler: PointSource, trials: int, ended: int
) -> str:
    """A summary of the sweep in two or three lines.

    Args:
        folder: the sweep's.
        experiment: the composed config.
        definition: the sweep file.
        sampler: gives the points.
        trials: the number of trials of the sweep.
        ended: how many have ended.
    """
    size = "" if sampler.size == math.inf else f" of {sampler.size:g} points"
    done = f", {ended} already ended" if ended else ""
    name = f" ({definition.name})" if definition.name else ""
    target = (
        "" if definition.target is None else f"\n       ends when {definition.metric.name} reaches {definition.target:g}"
    )
    bounds = "".join(f"\n       {constraint}" for constraint in definition.constraints)
    notes = "".join(f"\n       {note}" for note in definition.notes)
    early = describe_early_stopping(experiment, definition)
    details = f"{target}{bounds}{early}{notes}"
    return f"sweep  {folder.path}{name}\n       {trials} trials{size}, method {definition.method}{done}{details}"


def describe_early_stopping(experiment: Experiment, definition: SweepDefinition) -> str:
    """When early stopping may stop a trial, in a line."""
    early, number = definition.early_terminate, evaluations_per_trial(experiment)
    if early is None:
        return ""
    judged = rungs(early, number) if early["type"] == "hyperband" else [n for n in [int(early["min_iter"])] if n < number]
    if not judged:
        return f"\n       early_terminate stops nothing: a trial has {number} evaluations. More: orpo.eval_fraction=0.1"
    return f"\n       stopped early ({early['type']}) after evaluation {', '.join(map(str, judged))} of {number}"


def print_preflight(console: Console, summary: dict[str, Any]) -> None:
    """Print the preflight's summary of model, SAEs and data."""
    lines = [f"model  {summary['model']}", *(f"SAE    {sae}" for sae in summary["saes"]), f"data   {summary['data']}"]
    if summary["more"]:
        lines.append(f"       and {summary['more']} more that the sweep's points name")
    console.print("\n".join(lines), soft_wrap=True, highlight=False)
