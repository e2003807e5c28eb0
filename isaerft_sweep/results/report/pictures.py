"""Matplotlib figures for papers as PNG, PDF and SVG, readable in print and in greyscale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from isaerft_sweep.results.axes import Axis, show_value
from isaerft_sweep.results.leaderboard import short_name
from isaerft_sweep.results.report.figures import (
    COLORS,
    LEADERS,
    OTHERS,
    UNRANKED,
    UNTRAINED_COLOR,
    dimensions,
    gain_and_harm,
    has,
    latent_name,
    shares,
    spending,
)
from isaerft_sweep.results.report.gather import Report
from isaerft_sweep.results.sweep_results import RankedTrial

DPI = 200
FORMATS = ("png", "pdf", "svg")
TEXT_STAYS_TEXT: dict[Any, Any] = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "isaerft-sweep"}
SIZE_IN = (6.0, 3.8)
PAPER = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
"""Box behind labels that lines cross."""
SHARES = 15
"""Latents in the picture of the best trial's vector."""

INTERVAL = "95 % over held-out pairs"
NO_DATE = {".pdf": "CreationDate", ".svg": "Date"}
"""Metadata to leave out, so that the same sweep gives the same bytes."""

Draw = Callable[[Any, Report], bool]
"""Draws on matplotlib axes; returns False when it has nothing to draw."""


def write_pictures(report: Report, folder: Path) -> list[Path]:
    """Write every picture that has data, in all ``FORMATS``; returns the paths of the PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in PICTURES.items():
        figure = Figure(figsize=SIZE_IN, layout="constrained")
        paths = [folder / f"{name}.{form}" for form in FORMATS]
        if draw(figure.subplots(), report):
            with rc_context(TEXT_STAYS_TEXT):
                for path in paths:
                    figure.savefig(path, dpi=DPI, metadata={} if path.suffix == ".png" else {NO_DATE[path.suffix]: None})
            written.append(paths[0])
        else:
            for path in paths:
                path.unlink(missing_ok=True)  # from an earlier report
    return written


def _error_bars(entries: Sequence[RankedTrial], values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Distances from each value to the ends of its 95 % interval [2, trials]; NaN without an interval."""
    intervals = [entry.interval or (np.nan, np.nan) for entry in entries]
    return np.array([[max(0.0, v - low), max(0.0, high - v)] for v, (low, high) in zip(values, intervals, strict=True)]).T


def _tradeoff(ax: Any, report: Report) -> bool:
    data = gain_and_harm(report)
    if data is None:
        return False
    _draw_intervals(ax, data.harms, data.entries, data.gains)
    parts = data.by_kind(report)
    for number, (kind, part) in enumerate(parts.items()):
        color, name = COLORS[number % len(COLORS)], kind if len(parts) > 1 else "trial"
        for broken, fill, label in ((False, color, name), (True, "none", f"{name} that breaks a constraint")):
            points = [
                (x, y) for e, x, y in zip(part.entries, part.harms, part.gains, strict=True) if bool(e.violation) is broken
            ]
            if points:
                ax.scatter(*zip(*points, strict=True), s=60, facecolors=fill, edgecolors=color, zorder=3, label=label)
    if data.entries[0] is report.sweep.winner:
        _circle(ax, data.harms[:1], data.gains[:1])
    if data.untrained is not None:
        ax.scatter([0.0], [data.untrained], s=60, marker="D", c=UNTRAINED_COLOR, zorder=3, label="untrained")
    if data.bound is not None:
        ax.axvline(data.bound, color="#777", linestyle="--", linewidth=1, label=f"at most {data.bound:g}")
    ax.set_xlabel("KL from the base model, nats per answer token")
    ax.set_ylabel(report.sweep.metric.name)
    ax.legend(loc="best", fontsize=8, framealpha=0.8)
    return True


def _circle(ax: Any, xs: Sequence[Any], ys: Sequence[Any]) -> None:
    """Mark the winner."""
    ax.scatter(xs, ys, s=220, facecolors="none", edgecolors="black", linewidths=1.4, zorder=4, label="best")


def _draw_intervals(
    ax: Any, xs: Sequence[Any] | np.ndarray, entries: Sequence[RankedTrial], values: Sequence[Any] | np.ndarray
) -> None:
    bars = _error_bars(entries, values)
    if np.isfinite(bars).any():
        ax.errorbar(xs, values, yerr=bars, fmt="none", ecolor="#888", elinewidth=0.9, capsize=2, zorder=2, label=INTERVAL)


def _map(ax: Any, report: Report) -> bool:
    if not report.axes or not report.completed:
        return False
    x, y = report.axes[0], (report.axes[1] if len(report.axes) > 1 else None)
    metric, entries = report.sweep.metric.name, [e for e in report.completed[::-1] if has(e, x, y)]
    if not entries:
        return False
    values = [e.value(metric) for e in entries]
    colormap = "viridis" if report.sweep.metric.goal == "maximize" else "viridis_r"
    xs = [x.coordinate(e.params[x.key]) for e in entries]
    ys = [y.coordinate(e.params[y.key]) for e in entries] if y else values
    points = ax.scatter(xs, ys, c=values, cmap=colormap, s=60, edgecolors="#444", linewidths=0.6, zorder=3,
                        label="completed")  # fmt: skip
    if entries[-1] is report.sweep.winner:
        _circle(ax, xs[-1:], ys[-1:])
    for name, states, symbol, color in UNRANKED:
        others = [e for e in report.sweep.entries if e.state in states and has(e, x, y)]
        if others and y:
            positions = [x.coordinate(e.params[x.key]) for e in others], [y.coordinate(e.params[y.key]) for e in others]
            ax.scatter(*positions, marker="x" if symbol == "x" else "1", c=color, s=50, label=name)
    ax.figure.colorbar(points, ax=ax, label=short_name(metric))
    _scale(ax.xaxis, ax.set_xscale, ax.set_xlabel, x)
    if y:
        _scale(ax.yaxis, ax.set_yscale, ax.set_ylabel, y)
    else:
        _draw_intervals(ax, xs, entries, values)
        ax.set_ylabel(metric)
    ax.legend(loc="best", fontsize=8, framealpha=0.8)
    return True


def _curves(ax: Any, report: Report) -> bool:
    by_trial = report.curves.get(report.sweep.metric.name) or report.curves.get("train/loss")
    if not by_trial:
        return False
    name = next(n for n, curves in report.curves.items() if curves is by_trial)
    leaders = [e for e in report.completed if e.record.index in by_trial][:LEADERS]
    leader_numbers = {e.record.index for e in leaders}
    others = [curve for index, curve in by_trial.items() if index not in leader_numbers]
    for i, curve in enumerate(others):
        ax.plot(curve.steps, curve.values, color=OTHERS, linewidth=0.8, label=None if i else f"{len(others)} others")
    for i, entry in enumerate(leaders):
        curve = by_trial[entry.record.index]
        style = {"color": COLORS[i % len(COLORS)], "marker": "o" if len(curve.steps) < 40 else None, "markersize": 3}
        ax.plot(curve.steps, curve.values, label=report.label(entry), linewidth=1.4, **style)
    if name == report.sweep.metric.name:
        ends = [(e, by_trial[e.record.index]) for e in leaders if len(by_trial[e.record.index].steps)]
        last = [float(curve.values[-1]) for _, curve in ends]
        _draw_intervals(ax, [float(curve.steps[-1]) for _, curve in ends], [e for e, _ in ends], last)
    ax.set_xlabel("step")
    ax.set_ylabel(name)
    ax.legend(fontsize=7, framealpha=0.8)
    return True


def _parallel(ax: Any, report: Report) -> bool:
    entries, shown = dimensions(report)
    if not shown:
        return False
    heights = np.array([_rescaled(d.values, d.values + (d.ticks or [])) for d in shown])  # [dimensions, trials]
    metric, maximize = report.sweep.metric.name, report.sweep.metric.goal == "maximize"
    values = np.array([e.value(metric) for e in entries])
    lowest, highest = values.min(), values.max()
    scale = ScalarMappable(Normalize(lowest, highest), "viridis" if maximize else "viridis_r")
    colors = scale.to_rgba(values)
    lines = np.stack([np.broadcast_to(np.arange(len(shown)), heights.T.shape), heights.T], axis=-1)[::-1]  # the best on top
    ax.add_collection(LineCollection(list(lines), colors=colors[::-1], linewidths=[1.0] * (len(entries) - 1) + [2.2]))
    for x, dimension in enumerate(shown):
        ax.axvline(x, color="#444", linewidth=0.8, zorder=0)
        ticks = dimension.ticks or [float(v) for v in np.linspace(min(dimension.values), max(dimension.values), 3)]
        labels = dimension.tick_labels or [f"{tick:.3g}" for tick in ticks]
        for y, label in dict(zip(_rescaled(ticks, dimension.values + ticks), labels, strict=True)).items():
            ax.annotate(label, (x, y), (4, 0), textcoords="offset points", fontsize=7, va="center", zorder=4, bbox=PAPER)
    ax.figure.colorbar(scale, ax=ax, label=short_name(metric))
    ax.plot([], [], color=colors[0], linewidth=2.2, label=f"best: {report.label(entries[0])}")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=7, frameon=False)
    ax.set_xticks(range(len(shown)), [d.label for d in shown])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.margins(x=0.08)
    return True


def _rescaled(values: list[float], all_values: list[float]) -> list[float]:
    """``values`` scaled so that ``all_values`` span 0 to 1; 0.5 when these are all equal."""
    low, high = min(all_values), max(all_values)
    return [(v - low) / (high - low) if high > low else 0.5 for v in values]


def _cost(ax: Any, report: Report) -> bool:
    progress = spending(report)
    if progress is None:
        return False
    entries, hours, values, best = progress
    _draw_intervals(ax, hours, entries, values)
    ax.plot(hours, best, drawstyle="steps-post", color=COLORS[0], linewidth=1.6, label="best so far")
    ax.scatter(hours, values, c=OTHERS, edgecolors="#777", s=28, label="trial", zorder=3)
    ax.set_xlim(left=0)
    ax.set_xlabel("device-hours spent")
    ax.set_ylabel(report.sweep.metric.name)
    ax.legend(fontsize=8, framealpha=0.8)
    return True


def _importance(ax: Any, report: Report) -> bool:
    if report.importance is None:
        return False
    ordered = shares(report)
    ax.barh([name for name, _ in ordered], [share for _, share in ordered], color=COLORS[0])
    ax.set_xlabel(f"share (PED-ANOVA, best {report.importance.good} of {report.importance.trials} trials)")
    ax.set_xlim(0, 1)
    return True


def _latents(ax: Any, report: Report) -> bool:
    if not report.latents:
        return False
    across = report.latents[0]
    site = across.sites[0]
    top = site.top(SHARES)[::-1]
    colors = [COLORS[0] if site.moved[i] > 0 else COLORS[1] for i in top]
    ax.barh([latent_name(i, across) for i in top], 100 * site.share[top], color=colors)
    for color, label in ((COLORS[0], "raised"), (COLORS[1], "lowered")):
        if color in colors:
            ax.bar([], [], color=color, label=label)
    if top:
        ax.legend(loc="lower right", fontsize=8, framealpha=0.8)
    ax.tick_params(axis="y", labelsize=7)
    ax.set_xlabel(f"share of the steering vector, % (layer {site.layer}, best trial)")
    return bool(top)


def _similarity(ax: Any, report: Report) -> bool:
    if not report.latents or len(report.latents[0].entries) < 2:
        return False
    across = report.latents[0]
    image = ax.imshow(across.cosines, vmin=-1, vmax=1, cmap="RdBu_r")
    names = [f"#{entry.record.index + 1}" for entry in across.entries]
    ax.set_xticks(np.arange(len(names)), names, fontsize=7, rotation=90)
    ax.set_yticks(np.arange(len(names)), names, fontsize=7)
    ax.figure.colorbar(image, ax=ax, label="cosine of steering vectors, best trials first")
    return True


def _scale(axis: Any, set_scale: Any, set_label: Any, parameter: Axis) -> None:
    set_label(parameter.label)
    if parameter.kind == "log":
        set_scale("log")
    ticks = range(len(parameter.values)) if parameter.kind == "category" else parameter.ticks
    values = parameter.values if parameter.kind == "category" else parameter.ticks
    if values:
        axis.set_ticks(list(ticks), [show_value(value) for value in values])
        axis.set_ticks([], minor=True)


PICTURES: dict[str, Draw] = {
    "tradeoff": _tradeoff,
    "space": _map,
    "curves": _curves,
    "parallel": _parallel,
    "cost": _cost,
    "importance": _importance,
    "latents": _latents,
    "similarity": _similarity,
}
