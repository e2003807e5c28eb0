"""Renders the report page: tables and figures in the HTML template."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from isaerft_sweep.paths import asset
from isaerft_sweep.results.analysis import columns as metric_columns
from isaerft_sweep.results.analysis import read_analysis, rows_by_latent, rows_by_strength
from isaerft_sweep.results.answer import KL, answer, methods
from isaerft_sweep.results.leaderboard import (
    best_column,
    caveats,
    columns,
    expected_column,
    interval_column,
    number,
    short_name,
    show_interval,
    show_rank,
)
from isaerft_sweep.results.report import figures
from isaerft_sweep.results.report.gather import COMPARED, Report, SiteAcrossTrials
from isaerft_sweep.results.samples import stale
from isaerft_sweep.results.standing import describe
from isaerft_sweep.results.statistics import show_probability
from isaerft_sweep.results.sweep_results import KIND, RankedTrial
from isaerft_sweep.version import __version__

TEMPLATE = "report.html.jinja"
ROWS = 50
"""Trials in the page's leaderboard; ``leaderboard.csv`` has all of them."""
LATENTS = 15


@dataclass(frozen=True)
class Served:
    """What a server adds to a sweep's page, which it shows instead of writing it.

    ``scripts``: addresses of plotly and ``report.js``, which are otherwise in the page. ``links``: of the runs, by trial
    number. ``fields``: names and values. ``forms``: address, value and label of each button. ``tables``: HTML. ``text``: a
    heading with a text. ``refresh``: seconds until the page loads again, 0: never.
    """

    trail: Sequence[tuple[str, str]]
    scripts: Sequence[str]
    links: Mapping[int, str]
    fields: Sequence[tuple[str, str]]
    forms: Sequence[tuple[str, str, str]]
    tables: str
    text: tuple[str, str]
    refresh: int


def render(report: Report, served: Served | None = None) -> str:
    """The whole page: one HTML file that needs no network, or a server's."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(asset(TEMPLATE).read_text(encoding="utf-8"))
    named_figures = {
        "pareto": figures.pareto(report),
        "tradeoff": figures.tradeoff(report),
        "map": figures.space_map(report),
        # drawn by WebGL, whose code a server's content policy does not let run
        "parallel": None if served else figures.parallel(report),
        "importance": figures.importances(report),
        "cost": figures.cost(report),
    }
    return template.render(
        served=served,
        scripts=[] if served else [get_plotlyjs(), asset("report.js").read_text(encoding="utf-8")],
        sweep=report.sweep,
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
        summary=summary(report),
        answer=answer(report.sweep),
        methods=method_table(report),
        recipe=recipe(report),
        caveats=caveats(report.sweep),
        leaderboard=leaderboard(report),
        figures={name: as_html(figure, name) if figure else "" for name, figure in named_figures.items()},
        curves=[(name, thinning(report, name), as_html(figures.curves(report, name), f"curve-{i}"))
                for i, name in enumerate(report.curves)],
        importance=report.importance,
        confirmed=confirmed(report),
        analysis=analysis_tables(report),
        failures=failures(report),
        costs=costs(report),
        latents=[latents(report, across, i) for i, across in enumerate(report.latents)],
        samples=report.samples,
        stale=bool(report.samples) and stale(report.samples, report.sweep),
        space={key: describe(distribution) for key, distribution in report.sweep.space.items()},
        environment=report.environment,
    )  # fmt: skip


def as_html(figure: go.Figure, name: str) -> str:
    """A figure as an empty block and its data, which ``report.js`` draws: no code stands in the page."""
    data = figure.to_json().replace("<", "\\u003c")
    height = figure.layout.height or 450
    return (
        f'<div id="figure-{name}" class="plotly-graph-div" style="height:{height}px"></div>'
        f'<script type="application/json" class="figure">{data}</script>'
    )


def summary(report: Report) -> list[tuple[str, str]]:
    """The sweep's summary as names and values."""
    sweep = report.sweep
    counts = Counter(entry.state for entry in sweep.entries)
    rows = [
        ("trials", ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none yet"),
        ("ranked by", "; ".join(f"{goal.name}, {goal.goal}" for goal in sweep.goals or (sweep.metric,))),
    ]
    if sweep.metric != sweep.own:
        rows.append(("the sweep itself searched by", f"{sweep.own.name}, {sweep.own.goal}"))
    best = report.sweep.winner
    if best:
        rows.append(("best trial", f"{report.label(best)}: {best.record.name}"))
    elif report.completed:
        rows.append(("best trial", f"none: {report.sweep.why_unranked()}"))
    return rows


def leaderboard(report: Report) -> dict[str, Any]:
    """Header, rows, and how many trials are left out."""
    names = columns(report.sweep)
    names_of_swept = [column.name for column in report.columns]
    header = ["rank", "trial", *names_of_swept, short_name(names[0]), *expected_column(report.sweep)]
    header += [*interval_column(report.sweep), *best_column(report.sweep), *(short_name(n) for n in names[1:]), "time"]
    rows = [_row(report, entry, names) for entry in report.sweep.entries[:ROWS]]
    untrained = next((e.untrained for e in report.sweep.entries if e.untrained), None)
    if untrained:
        blank = [""] * len(report.columns)
        values = [number(untrained.get(n)) for n in names]
        unknown = [""] * sum(len(f(report.sweep)) for f in (expected_column, interval_column, best_column))
        rows.append(["", "untrained", *blank, values[0], *unknown, *values[1:], ""])
    return {"header": header, "rows": rows, "left_out": max(0, len(report.sweep.entries) - ROWS), "links": True}


def _row(report: Report, entry: RankedTrial, names: list[str]) -> list[str]:
    values = [number(entry.metrics.get(n)) if entry.rank else "" for n in names]
    chance = "" if entry.probability_best is None else show_probability(entry.probability_best)
    params = [column.show(entry.params) for column in report.columns]
    time_s = f"{entry.record.seconds:.0f} s" if entry.rank else entry.state
    sure = [number(entry.expected)] if report.sweep.seeds_known else []
    sure += [show_interval(entry)] if interval_column(report.sweep) else []
    sure += [chance] if best_column(report.sweep) else []
    return [show_rank(entry), f"#{entry.record.index + 1}", *params, values[0], *sure, *values[1:], time_s]


def method_table(report: Report) -> dict[str, Any] | None:
    """The kinds of adapter by their best trials; None when all trials are of one kind."""
    compared = methods(report.sweep)
    if not compared:
        return None
    names = columns(report.sweep)
    header = ["kind", "trials", "best trial", *(column.name for column in report.columns if column.key != KIND)]
    header += [short_name(names[0]), "95 %", "one of them is best", *(short_name(name) for name in names[1:])]
    rows = []
    for method in compared:
        best = method.best
        cells = [method.kind, f"{method.completed} of {method.trials}", report.label(best) if best else "none"]
        cells += [column.show(best.params) if best else "" for column in report.columns if column.key != KIND]
        cells += [number(best.metrics.get(names[0])), show_interval(best)] if best else ["", ""]
        cells.append("" if method.probability_best is None else show_probability(method.probability_best))
        cells += [number(best.metrics.get(name)) if best else "" for name in names[1:]]
        rows.append(cells)
    return {"header": header, "rows": rows, "left_out": 0}


def analysis_tables(report: Report) -> dict[str, Any] | None:
    """The winner at other strengths and its largest latents; None until `analyze` has measured them."""
    winner = report.sweep.winner
    result = read_analysis(winner.folder) if winner else None
    if winner is None or result is None:
        return None
    name = report.sweep.metric.name
    names = metric_columns(name, result)
    two = names[:1] + [n for n in names if n == KL != name]
    by_strength = {"header": ["strength", *map(short_name, names)], "rows": rows_by_strength(result, names), "left_out": 0}
    headers = [f"{short_name(n)} {case}" for case in ("without it", "alone") for n in two]
    by_latent = {"header": ["layer.latent", "value", *headers], "rows": rows_by_latent(result, two), "left_out": 0}
    figure = figures.strength(result, name)
    return {
        "trial": report.label(winner),
        "strengths": by_strength,
        "latents": by_latent if result["latents"] else None,
        "figure": as_html(figure, "strength") if figure else "",
    }


def recipe(report: Report) -> list[tuple[str, str]]:
    """Model, SAE, data, adapter, loss and seed of the sweep, and the commands to run and to load the winner."""
    sweep, experiment = report.sweep, report.sweep.experiment
    if experiment is None:
        return []
    model, data, adapter, orpo = experiment.model, experiment.data, experiment.adapter, experiment.orpo
    saes = [f"layer {s.layer}: {s.sae_path or f'{s.sae_release} / {s.sae_id}'}" for s in adapter.sites]
    rows = [
        ("model", model.name),
        ("hook points", "; ".join(saes)),
        ("data", data.path or data.name),
        ("adapter", adapter.kind if KIND not in sweep.swept else "swept"),
        ("recipe", f"{orpo.loss.upper()}, {orpo.batch_size} × {orpo.gradient_accumulation} pairs a step, {orpo.schedule}"),
        ("seed", str(orpo.seed)),
    ]
    winner = sweep.winner
    if winner and winner.folder:
        rows += [
            ("run it again", sweep.best_command()),
            ("load it", f"isw.load_sweep({sweep.source!r}).best().load_model()"),
        ]
    return rows


def thinning(report: Report, name: str) -> str:
    """A note on how many points of the curves are drawn; empty when all are."""
    curves = report.curves[name].values()
    shown, total = sum(len(c.steps) for c in curves), sum(c.total for c in curves)
    if shown == total:
        return ""
    return f"{shown:,} of {total:,} points are drawn: the lowest and the highest of each stretch, so no peak is missing."


def confirmed(report: Report) -> dict[str, Any] | None:
    """The table of leaders with new seeds; None without a confirmation."""
    if not report.confirmed:
        return None
    header = ["trial", "seeds", "mean", "± seeds", "expected", "best", "first run"]
    rows = [
        [
            report.label(c.first),
            str(len(c.values)),
            number(c.mean),
            number(c.spread),
            number(c.first.expected),
            "" if c.first.probability_best is None else show_probability(c.first.probability_best),
            number(c.first.value(report.sweep.metric.name)),
        ]
        for c in report.confirmed
    ]
    return {"header": header, "rows": rows, "left_out": 0}


def failures(report: Report) -> list[tuple[str, str, str]]:
    """Trials that did not complete: label, state and message."""
    lost = [e for e in report.sweep.entries if e.state in ("failed", "diverged", "stopped", "crashed")]
    return [(report.label(e), e.state, e.record.message or "no reason was recorded") for e in lost]


def costs(report: Report) -> list[tuple[str, str]]:
    """Device time and tokens of the sweep as names and values."""
    entries = report.sweep.entries
    hours = sum(e.device_s for e in entries) / 3600
    wasted = sum(e.device_s for e in entries if not e.rank) / 3600
    tokens = sum(e.metrics.get("train/num_tokens", 0) for e in entries)
    rows = [("device-hours", f"{hours:.3f}, of which {wasted:.3f} in trials that have no result")]
    if report.completed:
        rows.append(
            ("a completed trial", f"{sum(e.record.seconds for e in report.completed) / len(report.completed):.0f} s")
        )
    if tokens:
        rows.append(("tokens trained on", f"{tokens:,.0f}"))
    return rows


def latents(report: Report, across: SiteAcrossTrials, number_: int) -> dict[str, Any]:
    """The template's fields of one site."""
    best, similar = across.sites[0], figures.similarity(across, report)
    rows = [
        {
            "name": figures.latent_name(i, across),
            "link": best.link(i),
            "moved": f"{best.moved[i]:+.4f}",
            "share": f"{best.share[i]:.1%}",
            "before": f"{best.before[i]:.1%}",
            "after": f"{best.after[i]:.1%}",
        }
        for i in best.top(LATENTS)
    ]
    return {
        "layer": best.layer,
        "trial": report.label(across.entries[0]),
        "d_sae": best.d_sae,
        "moved": int((best.moved != 0).sum()),
        "norm": f"{best.norm:.3g}",
        "tokens": best.tokens,
        "rows": rows,
        "similarity": as_html(similar, f"similarity-{number_}") if similar else "",
        "compared": len(across.entries),
        "at_most": COMPARED,
        "agreed": [
            {"name": figures.latent_name(a.latent, across), "link": best.link(a.latent), "up": a.up, "down": a.down,
             "share": f"{a.share:.1%}"} for a in across.agreed
        ],
    }  # fmt: skip
