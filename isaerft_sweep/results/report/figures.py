"""The plotly figures of the report page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from isaerft_sweep.results.answer import trials_by_kind
from isaerft_sweep.results.axes import Axis, show_value
from isaerft_sweep.results.leaderboard import short_name
from isaerft_sweep.results.report.gather import Report, SiteAcrossTrials
from isaerft_sweep.results.sweep_results import RankedTrial

LEADERS = 8
"""Trials whose curves get their own colour and name."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#000000")
UNTRAINED_COLOR = "#000000"
"""Okabe and Ito's palette, safe for colour-blind readers."""
OTHERS = "#c3c8cf"
KL = "eval/kl_base"
UNRANKED = (
    ("stopped early", ("pruned",), "circle-open", "#8a929c"),
    ("failed or diverged", ("failed", "diverged"), "x", "#c0392b"),
)
"""How the map shows trials without a rank: name, states, symbol and colour."""


def space_map(report: Report) -> go.Figure | None:
    """The trials over the first two swept parameters, coloured by the metric."""
    if not report.axes:
        return None
    x, y = report.axes[0], (report.axes[1] if len(report.axes) > 1 else None)
    metric = report.sweep.metric.name
    figure = _figure(460)
    ranked = [e for e in report.completed if has(e, x, y)]
    values = [e.value(metric) or 0.0 for e in ranked]
    best_first = list(reversed(range(len(ranked))))  # the best are drawn last, on top
    figure.add_scatter(
        x=[x.coordinate(ranked[i].params[x.key]) for i in best_first],
        y=[y.coordinate(ranked[i].params[y.key]) if y else values[i] for i in best_first],
        mode="markers",
        name="completed",
        marker={
            "size": [20 if ranked[i] is report.sweep.winner else 12 for i in best_first],
            "symbol": ["star" if ranked[i] is report.sweep.winner else "circle" for i in best_first],
            "color": [values[i] for i in best_first],
            "colorscale": "Viridis",
            "reversescale": report.sweep.metric.goal == "minimize",
            "showscale": True,
            "colorbar": {"title": {"text": short_name(metric)}},
            "line": {"width": 1, "color": "#444"},
        },
        error_y=None if y else error_bars([ranked[i] for i in best_first], [values[i] for i in best_first]),
        text=[f"{report.label(ranked[i])}<br>{metric} {values[i]:.4f}" for i in best_first],
        hoverinfo="text",
    )
    for name, states, symbol, color in UNRANKED:
        others = [e for e in report.sweep.entries if e.state in states and has(e, x, y)]
        if others and y:
            figure.add_scatter(
                x=[x.coordinate(e.params[x.key]) for e in others],
                y=[y.coordinate(e.params[y.key]) for e in others],
                mode="markers",
                name=name,
                marker={"size": 11, "symbol": symbol, "color": color},
                text=[f"{report.label(e)}<br>{e.state}" for e in others],
                hoverinfo="text",
            )
    _apply(figure.update_xaxes, x)
    if y:
        _apply(figure.update_yaxes, y)
    else:
        figure.update_yaxes(title_text=metric)
    figure.update_layout(legend={"orientation": "h", "y": 1.08})
    return figure


@dataclass(frozen=True)
class GainAndHarm:
    """Completed trials with both numbers, best first, their metric and their KL from the base model; the untrained model's
    metric if known, and the sweep's bound on the KL if it has one."""

    entries: list[RankedTrial]
    gains: list[float]
    harms: list[float]
    untrained: float | None
    bound: float | None

    def names(self, report: Report) -> list[str]:
        """A name for each trial that says whether it keeps the sweep's constraints."""
        broken = " (breaks a constraint)"
        return [report.label(entry) + (broken if entry.violation else "") for entry in self.entries]

    def by_kind(self, report: Report) -> dict[str, GainAndHarm]:
        """The trials of each ``adapter.kind``."""
        points = zip(self.entries, self.gains, self.harms, strict=True)
        of_entry = {id(entry): (gain, harm) for entry, gain, harm in points}
        return {
            kind: replace(
                self, entries=part, gains=[of_entry[id(e)][0] for e in part], harms=[of_entry[id(e)][1] for e in part]
            )
            for kind, part in trials_by_kind(self.entries, report.sweep).items()
        }


def gain_and_harm(report: Report) -> GainAndHarm | None:
    """What ``tradeoff`` draws; None when no trial has measured its KL from the base model."""
    name = report.sweep.metric.name
    measured = [(e, gain, harm) for e in report.completed if (gain := e.value(name)) is not None
             and (harm := e.metrics.get(KL)) is not None]  # fmt: skip
    if not measured or name == KL:
        return None
    entries, gains, harms = (list(column) for column in zip(*measured, strict=True))
    untrained = next((e.untrained for e in report.sweep.entries if e.untrained), {}).get(name)
    bound = min((c.bound for c in report.sweep.constraints if c.metric == KL and c.at_most), default=None)
    return GainAndHarm(entries, gains, harms, untrained, bound)


def tradeoff(report: Report) -> go.Figure | None:
    """The metric over the KL from the base model: trials that keep the sweep's constraints are filled."""
    data = gain_and_harm(report)
    if data is None:
        return None
    figure = _figure(420)
    parts = data.by_kind(report)
    for number, (kind, part) in enumerate(parts.items()):
        figure.add_scatter(
            x=part.harms,
            y=part.gains,
            mode="markers",
            name=kind if len(parts) > 1 else "trial",
            marker={
                "size": [20 if e is report.sweep.winner else 12 for e in part.entries],
                "symbol": [
                    "star" if e is report.sweep.winner else f"circle{'-open' * bool(e.violation)}" for e in part.entries
                ],
                "color": COLORS[number % len(COLORS)],
            },
            error_y=error_bars(part.entries, part.gains),
            text=part.names(report),
            hoverinfo="text+x+y",
        )
    if data.untrained is not None:
        figure.add_scatter(x=[0.0], y=[data.untrained], mode="markers", name="untrained", cliponaxis=False,
                           marker={"size": 12, "symbol": "diamond", "color": UNTRAINED_COLOR})  # fmt: skip
    if data.bound is not None:
        figure.add_vline(x=data.bound, line={"dash": "dash", "color": "#777"}, annotation_text=f"at most {data.bound:g}")
    figure.update_xaxes(title_text="KL from the base model, nats per answer token", rangemode="tozero")
    figure.update_yaxes(title_text=report.sweep.metric.name)
    figure.update_layout(legend={"orientation": "h", "y": 1.08})
    return figure


def pareto(report: Report) -> go.Figure | None:
    """The first two goals of all trials, with the front; None for a sweep with one."""
    goals = report.sweep.goals[:2]
    if len(goals) < 2:
        return None
    figure = _figure(420)
    points = [(e, [e.value(goal.name) for goal in goals]) for e in report.completed]
    points = [(e, values) for e, values in points if None not in values]
    for on_front, name in ((False, "other trials"), (True, "Pareto front")):
        part = sorted(((e, v) for e, v in points if e.on_front is on_front), key=lambda point: point[1][1] or 0.0)
        if part:
            figure.add_scatter(
                x=[values[1] for _, values in part],
                y=[values[0] for _, values in part],
                mode="lines+markers" if on_front and len(goals) == len(report.sweep.goals) else "markers",
                name=name,
                marker={"size": 11, "color": COLORS[0] if on_front else OTHERS},
                text=[report.label(e) for e, _ in part],
                hoverinfo="text+x+y",
            )
    figure.update_xaxes(title_text=f"{goals[1].name}, {goals[1].goal}")
    figure.update_yaxes(title_text=f"{goals[0].name}, {goals[0].goal}")
    return figure


def strength(result: Mapping[str, Any], metric: str) -> go.Figure | None:
    """Gain over harm as the winner's change is made weaker and stronger; None without the KL from the base model."""
    rows = [row for row in result["strengths"] if metric in row["metrics"] and KL in row["metrics"]]
    if not rows or metric == KL:
        return None
    figure = _figure(380)
    figure.add_scatter(
        x=[row["metrics"][KL] for row in rows],
        y=[row["metrics"][metric] for row in rows],
        mode="lines+markers+text",
        text=[f"× {row['strength']:g}" for row in rows],
        textposition="top center",
        marker={"size": 9, "color": COLORS[0]},
        name="the winner at other strengths",
        hoverinfo="text+x+y",
    )
    figure.update_xaxes(title_text="KL from the base model, nats per answer token", rangemode="tozero")
    figure.update_yaxes(title_text=metric)
    return figure


def curves(report: Report, metric: str) -> go.Figure:
    """A metric over the steps: the leaders in colour, all other trials in grey."""
    by_trial = report.curves[metric]
    figure = _figure(380)
    leaders = [e for e in report.completed if e.record.index in by_trial][:LEADERS]
    leader_numbers = {e.record.index for e in leaders}
    others = [curve for index, curve in by_trial.items() if index not in leader_numbers]
    if others:
        gap = np.array([np.nan], dtype=np.float32)
        figure.add_scattergl(
            x=np.concatenate([part for c in others for part in (c.steps.astype(np.float32), gap)]),
            y=np.concatenate([part for c in others for part in (c.values, gap)]),
            mode="lines",
            line={"color": OTHERS, "width": 1},
            name=f"{len(others)} others",
            hoverinfo="skip",
        )
    for i, entry in enumerate(leaders):
        curve = by_trial[entry.record.index]
        figure.add_scatter(
            x=curve.steps,
            y=curve.values,
            mode="lines+markers" if len(curve.steps) < 40 else "lines",
            line={"color": COLORS[i % len(COLORS)], "width": 2},
            name=report.label(entry),
        )
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(title_text=metric)
    return figure


def parallel(report: Report) -> go.Figure | None:
    """Parallel coordinates: every completed trial a line through its parameters and metrics."""
    entries, shown = dimensions(report)
    if not shown:
        return None
    metric = report.sweep.metric.name
    figure = _figure(420)
    figure.add_trace(
        go.Parcoords(
            line={
                "color": [e.value(metric) for e in entries],
                "colorscale": "Viridis",
                "reversescale": report.sweep.metric.goal == "minimize",
                "showscale": True,
                "colorbar": {"title": {"text": short_name(metric)}},
            },
            dimensions=[
                {"label": d.label, "values": d.values, "tickvals": d.ticks, "ticktext": d.tick_labels} for d in shown
            ],
        )
    )
    figure.update_layout(margin={"l": 70, "r": 70, "t": 60, "b": 30})
    return figure


def importances(report: Report) -> go.Figure | None:
    """Each parameter's importance as a bar."""
    if report.importance is None:
        return None
    ordered = shares(report)
    figure = _figure(120 + 34 * len(ordered))
    figure.add_bar(
        x=[share for _, share in ordered], y=[name for name, _ in ordered], orientation="h", marker_color=COLORS[0]
    )
    figure.update_xaxes(title_text="share", range=[0, 1], tickformat=".0%")
    return figure


def shares(report: Report) -> list[tuple[str, float]]:
    """Each parameter's name and importance, the smallest first."""
    names = {column.key: column.name for column in report.columns}
    by_key = report.importance.shares if report.importance else {}
    return [(names.get(key, key), share) for key, share in sorted(by_key.items(), key=lambda item: item[1])]


def cost(report: Report) -> go.Figure | None:
    """The best value so far over the device-hours spent, in trial order."""
    progress = spending(report)
    if progress is None:
        return None
    entries, hours, values, best = progress
    figure = _figure(320)
    figure.add_scatter(
        x=hours, y=best, mode="lines", line={"shape": "hv", "color": COLORS[0], "width": 2}, name="best so far"
    )
    figure.add_scatter(
        x=hours,
        y=values,
        mode="markers",
        marker={"color": OTHERS, "line": {"width": 1, "color": "#777"}, "size": 8},
        name="trial, 95 % over held-out pairs" if any(e.interval for e in entries) else "trial",
        error_y=error_bars(entries, values),
        text=[report.label(e) for e in entries],
        hoverinfo="text+y",
    )
    figure.update_xaxes(title_text="device-hours spent", rangemode="tozero")
    figure.update_yaxes(title_text=report.sweep.metric.name)
    return figure


def similarity(across: SiteAcrossTrials, report: Report) -> go.Figure | None:
    """Cosines between the trials' steering vectors."""
    if len(across.entries) < 2:
        return None
    names = [report.label(entry) for entry in across.entries]
    figure = _figure(max(360, 130 + 20 * len(names)))
    figure.add_heatmap(z=across.cosines, x=names, y=names, zmin=-1, zmax=1, colorscale="RdBu", reversescale=True)
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(type="category")
    return figure


@dataclass(frozen=True)
class Dimension:
    """One of the parallel axes: each trial's position, and custom ticks."""

    label: str
    values: list[float]
    ticks: list[float] | None = None
    tick_labels: list[str] | None = None


def dimensions(report: Report) -> tuple[list[RankedTrial], list[Dimension]]:
    """The completed trials and the parallel axes; no axes with fewer than two trials or no swept parameter."""
    entries = [e for e in report.completed if has(e, *report.axes)]
    if not report.axes or len(entries) < 2:
        return entries, []
    shown = [_dimension(axis, entries) for axis in report.axes]
    for name in dict.fromkeys(["eval/rewards/accuracies", "eval/nll_loss", report.sweep.metric.name]):
        values = [v for e in entries if (v := e.value(name)) is not None]
        if len(values) == len(entries):
            shown.append(Dimension(short_name(name), values))
    return entries, shown


def spending(report: Report) -> tuple[list[RankedTrial], np.ndarray, np.ndarray, np.ndarray] | None:
    """Trials in the order of their numbers, with arrays [trials]: device-hours spent up to each, its value (NaN without a
    rank) and the best value so far of trials that keep the constraints. None while no trial has a rank."""
    entries = sorted((e for e in report.sweep.entries if e.device_s), key=lambda e: e.record.index)
    metric, sign = report.sweep.metric.name, report.sweep.metric.sign
    if not any(e.rank for e in entries):
        return None
    hours = np.cumsum([e.device_s for e in entries]) / 3600
    values = np.array([v if e.rank and (v := e.value(metric)) is not None else np.nan for e in entries])
    allowed = np.where([bool(e.violation) for e in entries], np.nan, values)
    return entries, hours, values, sign * np.fmax.accumulate(sign * allowed)


def error_bars(entries: Sequence[RankedTrial], values: Sequence[float] | np.ndarray) -> dict[str, Any] | None:
    """Plotly's error bars for the trials' 95 % intervals; None without any interval."""
    if not any(entry.interval for entry in entries):
        return None
    intervals = [entry.interval or (value, value) for entry, value in zip(entries, values, strict=True)]
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for (_, high), value in zip(intervals, values, strict=True)],
        "arrayminus": [value - low for (low, _), value in zip(intervals, values, strict=True)],
        "thickness": 1,
        "width": 2,
        "color": "#888",
    }


def latent_name(latent: int, across: SiteAcrossTrials) -> str:
    """The latent's number, followed by its label if known."""
    label = across.labels.get(latent)
    return f"{latent} {label}" if label else str(latent)


def _figure(height: int) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13},
    )
    return figure


def has(entry: RankedTrial, *axes: Axis | None) -> bool:
    """Whether the trial has all these parameters: a trial read from W&B may lack some."""
    return all(axis is None or axis.key in entry.params for axis in axes)


def _apply(update: Any, axis: Axis) -> None:
    """Set a plotly axis to the parameter's scale and ticks."""
    settings: dict[str, Any] = {"title_text": axis.label}
    if axis.kind == "log":
        settings |= {"type": "log", "exponentformat": "power", "dtick": "D2", "tickangle": 0}
    if axis.kind == "category":
        settings |= {"tickvals": list(range(len(axis.values))), "ticktext": [show_value(v) for v in axis.values]}
    elif axis.ticks:
        settings |= {"tickvals": list(axis.ticks), "ticktext": [show_value(v) for v in axis.ticks]}
    update(**settings)


def _dimension(axis: Axis, entries: Sequence[RankedTrial]) -> Dimension:
    values = [axis.on_scale(e.params[axis.key]) for e in entries]
    if axis.kind == "category":
        return Dimension(
            axis.label, values, [float(i) for i in range(len(axis.values))], [show_value(v) for v in axis.values]
        )
    if axis.ticks:
        return Dimension(axis.label, values, [axis.on_scale(v) for v in axis.ticks], [show_value(v) for v in axis.ticks])
    if axis.kind == "log":
        ticks = [float(t) for t in np.linspace(min(values), max(values), 5)]
        return Dimension(axis.label, values, ticks, [f"{10**t:.1e}" for t in ticks])
    return Dimension(axis.label, values)
