"""The read-only web pages of projects, sweeps and runs. Plain HTML and SVG, without scripts or external resources."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2

from isaerft_sweep.paths import asset
from isaerft_sweep.serve.caller import Caller, stamp, thinned
from isaerft_sweep.serve.filters import select
from isaerft_sweep.serve.graphql_types import AGENT_SILENCE_S, AgentView
from isaerft_sweep.serve.run_state import AgentState
from isaerft_sweep.serve.runs import HISTORY, ServedRun
from isaerft_sweep.serve.sweeps import ServedSweep
from isaerft_sweep.tracking.metric_names import flat, is_number

MAX_TABLE_ROWS = 200
MAX_POINTS = 300
"""Of one line in a chart."""
MAX_HISTORY_ROWS = 20_000
"""Rows that a page reads of a long history, evenly spaced."""
MAX_CHARTS = 12
MAX_LINES = 50
"""In the chart of a sweep."""
REFRESH_S = 15


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    link: str = ""
    state: bool = False
    number: bool = False


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(asset("serve.html.jinja").read_text(encoding="utf-8"))


def _render(**content: Any) -> str:
    empty = {"fields": (), "charts": (), "tables": (), "text": None, "trail": (), "refresh": REFRESH_S}
    return _template().render({**empty, **content})


def overview(caller: Caller) -> str:
    """All sweeps and the latest runs."""
    server = caller.server
    sweeps = sorted(server.sweeps.values(), key=lambda s: -s.created)
    projects = [
        [Cell("/".join(key), f"/{key[0]}/{key[1]}"), Cell(stamp(created))] for key, created in server.projects.items()
    ]
    tables = [
        _sweep_table(caller, sweeps),
        {"name": "Projects", "header": ("project", "created"), "rows": projects, "empty": "None yet.", "more": 0},
    ]
    return _render(title="isaerft-sweep serve", tables=tables)


def project(caller: Caller, key: tuple[str, str]) -> str:
    """The sweeps and runs of a project."""
    server = caller.server
    sweeps = sorted((s for s in server.sweeps.values() if (s.entity, s.project) == key), key=lambda s: -s.created)
    runs = [run for run in server.runs.values() if (run.key.entity, run.key.project) == key]
    tables = [_sweep_table(caller, sweeps), _run_table(select(runs, None, "-created_at"), None)]
    return _render(title="/".join(key), trail=_trail(), tables=tables)


def sweep(caller: Caller, served: ServedSweep) -> str:
    """A sweep: its runs, best first, its agents and the metric's curves."""
    sign = "-" if served.goal == "maximize" else "+"
    metric = served.metric
    runs = select(list(caller.server.runs_of(served)), None, f"{sign}summary_metrics.{metric}" if metric else "+created_at")
    fields = [
        ("state", served.state),
        ("method", str(served.raw.get("method", ""))),
        ("metric", f"{metric}, {served.goal}" if metric else "none"),
        ("runs", f"{len(runs)}" + ("" if served.definition is None or served.cap == math.inf else f" of {served.cap:g}")),
        ("created", stamp(served.created)),
    ]
    curves = [(run, [(i + 1.0, value) for i, value in enumerate(run.curve)]) for run in runs[:MAX_LINES]]
    lines = [(_name(run), points) for run, points in curves if points]
    charts = [chart(metric, lines[::-1], unit="evaluation")] if lines else []
    agents = [AgentView(caller, agent) for agent in caller.server.agents.values() if agent.sweep == served.id]
    rows = [
        [
            Cell(view.host),
            Cell(_agent_state(view), state=True),
            Cell(f"{view.total_runs}", number=True),
            Cell(ago(view.agent.last_seen_wall)),
        ]
        for view in agents
    ]
    table: dict[str, Any] = {
        "name": "Agents",
        "header": ("host", "state", "runs", "last seen"),
        "rows": rows[-MAX_TABLE_ROWS:],
    }
    table |= {"empty": "No agents yet.", "more": max(0, len(rows) - MAX_TABLE_ROWS)}
    return _render(
        title=f"sweep {served.id}",
        trail=_trail((f"{served.entity}/{served.project}", f"/{served.entity}/{served.project}")),
        fields=fields,
        charts=charts,
        tables=[_run_table(runs, served), table],
        text=("Sweep file", served.config),
    )


def run(caller: Caller, served: ServedRun) -> str:
    """A run: its fields, curves, summary and config."""
    key = served.key
    trail = [(f"{key.entity}/{key.project}", f"/{key.entity}/{key.project}")]
    if served.sweep in caller.server.sweeps:
        trail.append((f"sweep {served.sweep}", f"/{key.entity}/{key.project}/sweeps/{served.sweep}"))
    fields = [
        ("id", key.name),
        ("state", served.state + (f", stop requested by the {served.stop}" if served.stop else "")),
        ("host", str(served.metadata.get("host") or "")),
        ("tags", ", ".join(served.metadata.get("tags") or [])),
        ("created", stamp(served.created)),
        ("last update", ago(served.updated)),
        ("rows", f"{served.line_counts[HISTORY]}"),
    ]
    summary = {name: value for name, value in sorted(flat(json.loads(served.summary))) if not name.startswith("_")}
    rows = [[Cell(name), Cell(show(value), number=True)] for name, value in summary.items()]
    table = {"name": "Summary", "header": ("name", "value"), "rows": rows, "empty": "Nothing yet.", "more": 0}
    values = {name: value for name, value in served.config_values().items() if name != "_wandb"}
    return _render(
        title=_name(served),
        trail=_trail(*trail),
        fields=fields,
        charts=run_charts(served),
        tables=[table],
        text=("Config", json.dumps(values, indent=1, sort_keys=True)),
        refresh=REFRESH_S if served.active else 0,
    )


def run_charts(served: ServedRun) -> list[dict[str, Any]]:
    """A chart for each of the run's metrics: the sweep's metric first, then evaluations, single values last."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in served.steps(most=MAX_HISTORY_ROWS):
        for name, value in flat(row):
            if not name.startswith("_") and is_number(value):
                points.setdefault(name, []).append((float(row["_step"]), float(value)))

    def rank(name: str) -> tuple[bool, bool, bool, str]:
        return name != served.metric, len(points[name]) == 1, not name.startswith("eval/"), name

    names = sorted(points, key=rank)
    return [chart(name, [(name, points[name])]) for name in names[:MAX_CHARTS]]


def chart(name: str, lines: Sequence[tuple[str, list[tuple[float, float]]]], unit: str = "step") -> dict[str, Any]:
    """Lines over steps as SVG points, scaled to the frame. The last line is highlighted; a line of one point is a dot.

    ``lines``: name and (x, y) points of each.
    """
    lines = [(label, [p for p in points if math.isfinite(p[1])]) for label, points in lines]
    all_points = [point for _, points in lines for point in points] or [(0.0, 0.0)]
    left, right = min(x for x, _ in all_points), max(x for x, _ in all_points)
    low, high = min(y for _, y in all_points), max(y for _, y in all_points)

    def position(x: float, y: float) -> str:
        across = 60 + 352 * ((x - left) / (right - left) if right > left else 0.5)
        down = 150 - 142 * ((y - low) / (high - low) if high > low else 0.5)
        return f"{across:.1f},{down:.1f}"

    drawn = [
        {
            "name": label,
            "kind": ("other" if i < len(lines) - 1 else "main") + (" point" if len(points) == 1 else ""),
            "points": " ".join(position(x, y) for x, y in thinned(points, MAX_POINTS) * (2 if len(points) == 1 else 1)),
        }
        for i, (label, points) in enumerate(lines)
    ]
    ends = {"first": f"{left:g}" if left < right else "", "last": f"{unit} {right:g}"}
    return {"name": name, "low": f"{low:.4g}", "high": f"{high:.4g}", "lines": drawn, **ends}


def _sweep_table(caller: Caller, sweeps: Sequence[ServedSweep]) -> dict[str, Any]:
    rows = []
    for served in sweeps[:MAX_TABLE_ROWS]:
        runs = list(caller.server.runs_of(served))
        best = (
            select(runs, None, f"{'-' if served.goal == 'maximize' else '+'}summary_metrics.{served.metric}")
            if served.metric
            else []
        )
        value = best[0].summary_value(served.metric, served.goal) if best else None
        rows.append(
            [
                Cell(str(served.raw.get("name") or served.id), f"/{served.entity}/{served.project}/sweeps/{served.id}"),
                Cell(f"{served.entity}/{served.project}", f"/{served.entity}/{served.project}"),
                Cell(served.state, state=True),
                Cell(f"{sum(run.active for run in runs)} of {len(runs)}", number=True),
                Cell(served.metric),
                Cell("" if value is None else f"{value:.4g}", number=True),
                Cell(stamp(served.created)),
            ]
        )
    header = ("sweep", "project", "state", "running", "metric", "best", "created")
    empty = "None yet: `wandb sweep FILE.yaml` creates one."
    return {"name": "Sweeps", "header": header, "rows": rows, "empty": empty, "more": max(0, len(sweeps) - MAX_TABLE_ROWS)}


def _run_table(runs: Sequence[ServedRun], sweep: ServedSweep | None) -> dict[str, Any]:
    """A table of runs; with a sweep, it shows the swept parameters."""
    swept, metric = (sweep.swept, sweep.metric) if sweep else ([], "")
    rows = []
    for served in runs[:MAX_TABLE_ROWS]:
        value = served.summary_value(metric, sweep.goal) if sweep and metric else None
        link = f"/{served.key.entity}/{served.key.project}/runs/{served.key.name}"
        cells = [Cell(_name(served), link), Cell(served.state, state=True)]
        cells += [Cell("" if value is None else f"{value:.4g}", number=True)] if metric else []
        point = sweep.point_of(served) if sweep else {}
        cells += [Cell(show(point[key]) if key in point else "", number=is_number(point.get(key))) for key in swept]
        cells += [] if sweep else [_sweep_cell(served)]
        cells += [Cell(f"{served.line_counts[HISTORY]}", number=True), Cell(ago(served.updated)), Cell(served.key.name)]
        rows.append(cells)
    header = (
        "run",
        "state",
        *((metric,) if metric else ()),
        *swept,
        *(() if sweep else ("sweep",)),
        "rows",
        "last update",
        "id",
    )
    return {"name": "Runs", "header": header, "rows": rows, "empty": "None yet.", "more": max(0, len(runs) - MAX_TABLE_ROWS)}


def _sweep_cell(served: ServedRun) -> Cell:
    link = f"/{served.key.entity}/{served.key.project}/sweeps/{served.sweep}" if served.sweep else ""
    return Cell(served.sweep, link)


def _agent_state(view: AgentView) -> str:
    """W&B's state, but "silent" for crashed: `wandb agent --count N` sends nothing when it exits."""
    silent = time.time() - view.agent.last_seen_wall > AGENT_SILENCE_S
    crashed = view.state is AgentState.CRASHED or (view.state is AgentState.RUNNING and silent)
    return "silent" if crashed else view.state


def _name(served: ServedRun) -> str:
    return str(served.metadata.get("displayName") or served.key.name)


def _trail(*steps: tuple[str, str]) -> Iterable[tuple[str, str]]:
    return [("isaerft-sweep serve", "/"), *steps]


def show(value: Any) -> str:
    """A value of the summary or the config, shortened."""
    return f"{value:.6g}" if is_number(value) else value[:120] if isinstance(value, str) else json.dumps(value)[:120]


def ago(seconds: float) -> str:
    """How long ago a time was, as text. ``seconds``: since the epoch."""
    passed = max(0.0, time.time() - seconds)
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if passed >= size:
            return f"{passed / size:.0f} {unit} ago"
    return f"{passed:.0f} s ago"
