"""The winner at other strengths, and what its largest latents do: gain and harm of each; stored in the trial's folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from isaerft_sweep.journal.atomic_files import read_json, write_json
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.results.leaderboard import short_name
from isaerft_sweep.results.torch_process import request

STRENGTHS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
LATENTS = 5
SHOWN = ("eval/log_odds_chosen", "eval/rewards/accuracies", "eval/kl_base", "eval/neutral_nll_rise")


def analyse(trial: TrialFolder, strengths: Sequence[float] = STRENGTHS, latents: int = LATENTS) -> Mapping[str, Any]:
    """Measure and write ``analysis.json``. Raises ModelError when that fails. This process never loads torch."""
    content = {"folder": str(trial.path), "strengths": list(strengths), "latents": latents}
    measured = request("isaerft_sweep.trial.variants", content, "evaluates the adapter")
    result = {"made": time.strftime("%Y-%m-%d %H:%M"), **measured}
    write_json(trial.analysis, result)
    return result


def read_analysis(trial: TrialFolder | None) -> Mapping[str, Any] | None:
    """What ``analyse`` has written; None without it, or when it cannot be read."""
    try:
        content: Any = read_json(trial.analysis) if trial else None
        return content if content and {"strengths", "latents"} <= set(content) else None
    except (ValueError, TypeError):
        return None


def columns(metric: str, result: Mapping[str, Any]) -> list[str]:
    """The metrics that are shown, the sweep's own first."""
    measured = result["strengths"][0]["metrics"] if result["strengths"] else {}
    return [name for name in dict.fromkeys([metric, *SHOWN]) if name in measured]


def rows_by_strength(result: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    """A row for each strength."""
    return [[f"{row['strength']:g}", *(f"{row['metrics'][n]:.4f}" for n in names)] for row in result["strengths"]]


def rows_by_latent(result: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    """A row for each latent: where, its value, the metrics without it and with it alone."""
    return [
        [f"{row['layer']}.{row['latent']}", f"{row['value']:+.4f}"]
        + [f"{row[case][name]:.4f}" for case in ("without", "alone") for name in names]
        for row in result["latents"]
    ]


def tables(metric: str, result: Mapping[str, Any]) -> list[Table]:
    """Both tables for a terminal."""
    names = columns(metric, result)
    by_strength = _table("The adapter at other strengths (1: as trained)", ["strength", *map(short_name, names)])
    for row in rows_by_strength(result, names):
        by_strength.add_row(*row, style="bold" if row[0] == "1" else "")
    if not result["latents"]:
        return [by_strength]
    two = names[:1] + [name for name in names if name == "eval/kl_base" and name != metric]
    headers = [f"{short_name(name)} {case}" for case in ("without it", "alone") for name in two]
    by_latent = _table("What the largest latents do", ["layer.latent", "value", *headers])
    for row in rows_by_latent(result, two):
        by_latent.add_row(*row)
    return [by_strength, by_latent]


def _table(title: str, headers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table
