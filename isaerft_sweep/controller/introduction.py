"""What a sweep prints before its first trial."""

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
    """What is about to happen, in two or three lines."""
    size = "" if sampler.size == math.inf else f" of {sampler.size:g} points"
    done = f", {ended} already ended" if ended else ""
    name = f" ({definition.name})" if definition.name else ""
    target = (
        "" if definition.target is None else f"\n       ends when {definition.metric.name} reaches {definition.target:g}"
    )
    notes = "".join(f"\n       {note}" for note in definition.notes)
    early = describe_early_stopping(experiment, definition)
    return (
        f"sweep  {folder.path}{name}\n       {trials} trials{size}, method {definition.method}{done}{target}{early}{notes}"
    )


def describe_early_stopping(experiment: Experiment, definition: SweepDefinition) -> str:
    """What early stopping will do, in a line."""
    asked, number = definition.early_terminate, evaluations_per_trial(experiment)
    if asked is None:
        return ""
    places = rungs(asked, number) if asked["type"] == "hyperband" else [n for n in [int(asked["min_iter"])] if n < number]
    if not places:
        return f"\n       early_terminate stops nothing: a trial has {number} evaluations. More: orpo.eval_fraction=0.1"
    return f"\n       stopped early ({asked['type']}) after evaluation {', '.join(map(str, places))} of {number}"


def print_facts(console: Console, facts: dict[str, Any]) -> None:
    """What the preflight found."""
    lines = [f"model  {facts['model']}", *(f"SAE    {sae}" for sae in facts["saes"]), f"data   {facts['data']}"]
    if facts["more"]:
        lines.append(f"       and {facts['more']} more that the sweep's points name")
    console.print("\n".join(lines), soft_wrap=True, highlight=False)
