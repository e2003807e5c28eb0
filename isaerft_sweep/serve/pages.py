"""The read-only pages for people: projects, sweeps, runs and their curves. Plain HTML and SVG, no script, no network."""

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
from isaerft_sweep.serve import runs as states
from isaerft_sweep.serve.caller import Caller, stamp, thinned
from isaerft_sweep.serve.filters import select
from isaerft_sweep.serve.graphql_types import AGENT_SILENCE_S, AgentView
from isaerft_sweep.serve.runs import ServedRun
from isaerft_sweep.serve.sweeps import ServedSweep
from isaerft_sweep.tracking.metric_names import flat, is_number

SHOWN = 200
POINTS = 300
DRAWN = 20_000
"""Rows of a long history that a page looks at, evenly spread."""
CHARTS = 12
LINES = 50
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
    empty = {"facts": (), "charts": (), "tables": (), "text": None, "trail": (), "refresh": REFRESH_S}
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
        {"name": "Projects", "header": ("project", "since"), "rows": projects, "empty": "None yet.", "more": 0},
    ]
    return _render(title="isaerft-sweep serve", tables=tables)


def project(caller: Caller, key: tuple[str, str]) -> str:
    """The sweeps and runs of a project."""
    server = caller.server
    sweeps = sorted((s for s in server.sweeps.values() if (s.entity, s.project) == key), key=lambda s: -s.created)
    runs = [run for run in server.runs.values() if (run.key.entity, run.key.project) == key]
    tables = [_sweep_table(caller, sweeps), _run_table(select(runs, None, "-created_at"), None)]
    return _render(title="/".join(key), trail=_trail(), tables=tables)


def sweep(caller: Caller, found: ServedSweep) -> str:
    """A sweep: its runs, the best first, its agents and the metric's curves."""
    sign = "-" if found.goal == "maximize" else "+"
    metric = found.metric
    runs = select(list(caller.server.runs_of(found)), None, f"{sign}summary_metrics.{metric}" if metric else "+created_at")
    facts = [
        ("state", found.state),
        ("method", str(found.raw.get("method", ""))),
        ("metric", f"{metric}, {found.goal}" if metric else "none"),
        ("runs", f"{len(runs)}" + ("" if found.definition is None or found.cap == math.inf else f" of {found.cap:g}")),
        ("since", stamp(found.created)),
    ]
    curves = [(run, [(i + 1.0, value) for i, value in enumerate(run.curve)]) for run in runs[:LINES]]
    lines = [(_name(run), points) for run, points in curves if points]
    charts = [chart(metric, lines[::-1], unit="evaluation")] if lines else []
    agents = [AgentView(caller, agent) for agent in caller.server.agents.values() if agent.sweep == found.id]
    rows = [
        [Cell(a.host), Cell(_agent_state(a), state=True), Cell(f"{a.total_runs}", number=True), Cell(ago(a.agent.heard))]
        for a in agents
    ]
    table: dict[str, Any] = {"name": "Agents", "header": ("host", "state", "runs", "heard"), "rows": rows[-SHOWN:]}
    table |= {"empty": "No agent has come yet.", "more": max(0, len(rows) - SHOWN)}
    return _render(
        title=f"sweep {found.id}",
        trail=_trail((f"{found.entity}/{found.project}", f"/{found.entity}/{found.project}")),
        facts=facts,
        charts=charts,
        tables=[_run_table(runs, found), table],
        text=("Sweep file", found.config),
    )


def run(caller: Caller, found: ServedRun) -> str:
    """A run: what it is, its curves, its config and its last output."""
    key = found.key
    trail = [(f"{key.entity}/{key.project}", f"/{key.entity}/{key.project}")]
    if found.sweep in caller.server.sweeps:
        trail.append((f"sweep {found.sweep}", f"/{key.entity}/{key.project}/sweeps/{found.sweep}"))
    facts = [
        ("id", key.name),
        ("state", found.state + (f", told to stop by the {found.stop}" if found.stop else "")),
        ("host", str(found.facts.get("host") or "")),
        ("tags", ", ".join(found.facts.get("tags") or [])),
        ("since", stamp(found.created)),
        ("last word", ago(found.updated)),
        ("rows", f"{found.lines[states.HISTORY]}"),
    ]
    summary = {name: value for name, value in sorted(flat(json.loads(found.summary))) if not name.startswith("_")}
    rows = [[Cell(name), Cell(show(value), number=True)] for name, value in summary.items()]
    table = {"name": "Summary", "header": ("name", "value"), "rows": rows, "empty": "Nothing yet.", "more": 0}
    values = {name: value for name, value in found.config_values().items() if name != "_wandb"}
    return _render(
        title=_name(found),
        trail=_trail(*trail),
        facts=facts,
        charts=run_charts(found),
        tables=[table],
        text=("Config", json.dumps(values, indent=1, sort_keys=True)),
        refresh=REFRESH_S if found.active else 0,
    )


def run_charts(found: ServedRun) -> list[dict[str, Any]]:
    """A curve for each of the run's metrics, the sweep's own first, then evaluations; single values last."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in found.steps(most=DRAWN):
        for name, value in flat(row):
            if not name.startswith("_") and is_number(value):
                points.setdefault(name, []).append((float(row["_step"]), float(value)))

    def place(name: str) -> tuple[bool, bool, bool, str]:
        return name != found.metric, len(points[name]) == 1, not name.startswith("eval/"), name

    names = sorted(points, key=place)
    return [chart(name, [(name, points[name])]) for name in names[:CHARTS]]


def chart(name: str, lines: Sequence[tuple[str, list[tuple[float, float]]]], unit: str = "step") -> dict[str, Any]:
    """Lines over steps as SVG's points, scaled to the frame; the last line stands out. One value alone is a dot."""
    lines = [(words, [p for p in points if math.isfinite(p[1])]) for words, points in lines]
    everything = [point for _, points in lines for point in points] or [(0.0, 0.0)]
    left, right = min(x for x, _ in everything), max(x for x, _ in everything)
    low, high = min(y for _, y in everything), max(y for _, y in everything)

    def place(x: float, y: float) -> str:
        across = 60 + 352 * ((x - left) / (right - left) if right > left else 0.5)
        down = 150 - 142 * ((y - low) / (high - low) if high > low else 0.5)
        return f"{across:.1f},{down:.1f}"

    drawn = [
        {
            "name": words,
            "kind": ("other" if i < len(lines) - 1 else "main") + (" point" if len(points) == 1 else ""),
            "points": " ".join(place(x, y) for x, y in thinned(points, POINTS) * (2 if len(points) == 1 else 1)),
        }
        for i, (words, points) in enumerate(lines)
    ]
    ends = {"first": f"{left:g}" if left < right else "", "last": f"{unit} {right:g}"}
    return {"name": name, "low": f"{low:.4g}", "high": f"{high:.4g}", "lines": drawn, **ends}


def _sweep_table(caller: Caller, sweeps: Sequence[ServedSweep]) -> dict[str, Any]:
    rows = []
    for found in sweeps[:SHOWN]:
        runs = list(caller.server.runs_of(found))
        best = (
            select(runs, None, f"{'-' if found.goal == 'maximize' else '+'}summary_metrics.{found.metric}")
            if found.metric
            else []
        )
        value = best[0].summary_value(found.metric, found.goal) if best else None
        rows.append(
            [
                Cell(str(found.raw.get("name") or found.id), f"/{found.entity}/{found.project}/sweeps/{found.id}"),
                Cell(f"{found.entity}/{found.project}", f"/{found.entity}/{found.project}"),
                Cell(found.state, state=True),
                Cell(f"{sum(run.active for run in runs)} of {len(runs)}", number=True),
                Cell(found.metric),
                Cell("" if value is None else f"{value:.4g}", number=True),
                Cell(stamp(found.created)),
            ]
        )
    header = ("sweep", "project", "state", "running", "metric", "best", "since")
    empty = "None yet: `wandb sweep FILE.yaml` makes one."
    return {"name": "Sweeps", "header": header, "rows": rows, "empty": empty, "more": max(0, len(sweeps) - SHOWN)}


def _run_table(runs: Sequence[ServedRun], sweep: ServedSweep | None) -> dict[str, Any]:
    """Runs; those of one sweep with what it varies, which tells them apart."""
    swept, metric = (sweep.swept, sweep.metric) if sweep else ([], "")
    rows = []
    for found in runs[:SHOWN]:
        value = found.summary_value(metric, sweep.goal) if sweep and metric else None
        link = f"/{found.key.entity}/{found.key.project}/runs/{found.key.name}"
        cells = [Cell(_name(found), link), Cell(found.state, state=True)]
        cells += [Cell("" if value is None else f"{value:.4g}", number=True)] if metric else []
        point = sweep.point_of(found) if sweep else {}
        cells += [Cell(show(point[key]) if key in point else "", number=is_number(point.get(key))) for key in swept]
        cells += [] if sweep else [_sweep_cell(found)]
        cells += [Cell(f"{found.lines[states.HISTORY]}", number=True), Cell(ago(found.updated)), Cell(found.key.name)]
        rows.append(cells)
    header = (
        "run",
        "state",
        *((metric,) if metric else ()),
        *swept,
        *(() if sweep else ("sweep",)),
        "rows",
        "last word",
        "id",
    )
    return {"name": "Runs", "header": header, "rows": rows, "empty": "None yet.", "more": max(0, len(runs) - SHOWN)}


def _sweep_cell(found: ServedRun) -> Cell:
    link = f"/{found.key.entity}/{found.key.project}/sweeps/{found.sweep}" if found.sweep else ""
    return Cell(found.sweep, link)


def _agent_state(view: AgentView) -> str:
    """`wandb agent --count N` leaves without a word, so one that is silent need not have crashed, as W&B calls it."""
    silent = time.time() - view.agent.heard > AGENT_SILENCE_S
    return "silent" if view.state == "CRASHED" or (view.state == "RUNNING" and silent) else view.state


def _name(found: ServedRun) -> str:
    return str(found.facts.get("displayName") or found.key.name)


def _trail(*steps: tuple[str, str]) -> Iterable[tuple[str, str]]:
    return [("isaerft-sweep serve", "/"), *steps]


def show(value: Any) -> str:
    """A value of the summary or the config, short."""
    return f"{value:.6g}" if is_number(value) else value[:120] if isinstance(value, str) else json.dumps(value)[:120]


def ago(seconds: float) -> str:
    """How long ago a time was, for people."""
    passed = max(0.0, time.time() - seconds)
    for size, word in ((86400, "days"), (3600, "h"), (60, "min")):
        if passed >= size:
            return f"{passed / size:.0f} {word} ago"
    return f"{passed:.0f} s ago"
