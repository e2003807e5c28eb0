"""The web pages of projects, sweeps and runs: HTML and SVG; a sweep's is the report's, with plotly from this server."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from isaerft_sweep.paths import asset
from isaerft_sweep.serve.caller import Caller, stamp, thinned
from isaerft_sweep.serve.filters import select
from isaerft_sweep.serve.graphql_types import AGENT_SILENCE_S, AgentView
from isaerft_sweep.serve.run_state import AgentState, SweepRunState
from isaerft_sweep.serve.runs import EVENTS, HISTORY, OUTPUT, ServedRun
from isaerft_sweep.serve.sweep_report import ACTIONS, render, snapshot
from isaerft_sweep.serve.sweeps import ServedSweep
from isaerft_sweep.tracking.metric_names import flat, is_number

MAX_TABLE_ROWS = 200
MAX_POINTS = 300
"""Of one line in a chart."""
MAX_HISTORY_ROWS = 20_000
"""Rows that a page reads of a long history, evenly spaced."""
MAX_CHARTS = 12
GAIN_AND_HARM = ("eval/log_odds_chosen", "eval/kl_base", "eval/nll_loss")
"""Goals and bounds of most sweeps: shown although a trial may have a single evaluation."""
MAX_LINES = 50
"""In the chart of a sweep."""
REFRESH_S = 15
REPORT_REFRESH_S = 30
MAX_IMAGES = 24
MAX_OUTPUT_LINES = 300
IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp"}
"""Media types that are shown in a page, by the file's ending."""
TABLES = "{{ tables_of(tables) }}"
STATIC = ("plotly.js", "report.js")
"""Scripts of a sweep's page."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    link: str = ""
    state: bool = False
    number: bool = False


@lru_cache(maxsize=2)
def _template(name: str) -> jinja2.Template:
    """The template of a whole page, or ``TABLES``, with the macros of tables."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    body = name if name == TABLES else asset(name).read_text(encoding="utf-8")
    return environment.from_string(asset("tables.html.jinja").read_text(encoding="utf-8") + body)


def _render(**content: Any) -> str:
    lists = dict.fromkeys(("fields", "forms", "charts", "system", "images", "tables", "trail"), ())
    empty = {**lists, "text": None, "note": "", "output": "", "refresh": REFRESH_S}
    return _template("serve.html.jinja").render({**empty, **content}).lstrip()


def _tables(tables: list[dict[str, Any]]) -> str:
    """The tables alone, as HTML."""
    return _template(TABLES).render(tables=tables)


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
    """A sweep without plotly: its runs, best first, its agents and the metric's curves."""
    runs = _best_first(caller, served)
    curves = [(run, [(i + 1.0, value) for i, value in enumerate(run.curve)]) for run in runs[:MAX_LINES]]
    lines = [(_name(run), points) for run, points in curves if points]
    note = "The answer, map, importance and interactive curves need the extra on the server: isaerft-sweep[report]."
    return _render(
        title=f"sweep {served.id}",
        note=note,
        trail=_trail(_project_link(served.entity, served.project)),
        fields=_sweep_fields(served, len(runs)),
        forms=sweep_forms(served),
        charts=[chart(served.metric, lines[::-1], unit="evaluation")] if lines else [],
        tables=[_run_table(runs, served), _agent_table(caller, served)],
        text=("Sweep file", served.config),
    )


def sweep_report(caller: Caller, served: ServedSweep) -> Callable[[], str]:
    """Makes the report's page of the sweep as it is now; another thread may do so."""
    runs = _best_first(caller, served)
    taken = snapshot(served, runs)
    tables = _tables([_run_table(runs, served), _agent_table(caller, served)])
    fields, forms = _sweep_fields(served, len(runs)), sweep_forms(served)
    is_over = served.state in (SweepRunState.FINISHED, SweepRunState.CANCELED) and not any(run.active for run in runs)

    def surroundings(ids: dict[int, str]) -> Any:
        from isaerft_sweep.results.report.page import Served

        return Served(
            trail=list(_trail(_project_link(served.entity, served.project))),
            scripts=[f"/static/{name}" for name in STATIC],
            links={index: f"/{served.entity}/{served.project}/runs/{name}" for index, name in ids.items()},
            fields=fields,
            forms=forms,
            tables=tables,
            text=("Sweep file", served.config),
            refresh=0 if is_over else REPORT_REFRESH_S,
        )

    return lambda: render(taken, surroundings)


def sweep_forms(served: ServedSweep) -> list[tuple[str, str, str]]:
    """Address, value and label of the buttons that change the sweep's state."""
    address = f"/{served.entity}/{served.project}/sweeps/{served.id}/state"
    return [] if served.stored_only else [(address, state, label) for state, label in ACTIONS.get(served.state, ())]


def _best_first(caller: Caller, served: ServedSweep) -> list[ServedRun]:
    sign = "-" if served.goal == "maximize" else "+"
    order = f"{sign}summary_metrics.{served.metric}" if served.metric else "+created_at"
    return select(list(caller.server.runs_of(served)), None, order)


def _sweep_fields(served: ServedSweep, runs: int) -> list[tuple[str, str]]:
    return [
        ("state", served.state),
        ("method", str(served.raw.get("method", ""))),
        ("metric", f"{served.metric}, {served.goal}" if served.metric else "none"),
        ("runs", f"{runs}" + ("" if served.definition is None or served.cap == math.inf else f" of {served.cap:g}")),
        ("created", stamp(served.created)),
    ]


def _agent_table(caller: Caller, served: ServedSweep) -> dict[str, Any]:
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
    return table | {"empty": "No agents yet.", "more": max(0, len(rows) - MAX_TABLE_ROWS)}


def run(caller: Caller, served: ServedRun) -> str:
    """A run: its fields, curves, summary, config, files, console output and the machine's load."""
    key = served.key
    address = f"/{key.entity}/{key.project}/runs/{key.name}"
    trail = [_project_link(key.entity, key.project)]
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
    rows = [[Cell(name), Cell(show(value), number=is_number(value))] for name, value in summary.items()]
    table = {"name": "Summary", "header": ("name", "value"), "rows": rows, "empty": "Nothing yet.", "more": 0}
    values = {name: value for name, value in served.config_values().items() if name != "_wandb"}
    folder = caller.server.files_of(served)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in IMAGES]
    return _render(
        title=_name(served),
        trail=_trail(*trail),
        fields=fields,
        forms=[(f"{address}/stop", "stop", "Stop")] if served.active and not served.stop else [],
        charts=run_charts(served),
        system=system_charts(served),
        images=[(path.relative_to(folder).as_posix(), _file_link(address, path, folder)) for path in images[-MAX_IMAGES:]],
        tables=[table, _file_table(address, files, folder)],
        output="\n".join(served.rows(OUTPUT)[-MAX_OUTPUT_LINES:]),
        text=("Config", json.dumps(values, indent=1, sort_keys=True)),
        refresh=REFRESH_S if served.active else 0,
    )


def _file_table(address: str, files: Sequence[Path], folder: Path) -> dict[str, Any]:
    rows = [
        [
            Cell(path.relative_to(folder).as_posix(), _file_link(address, path, folder)),
            Cell(f"{path.stat().st_size:,}", number=True),
            Cell(stamp(path.stat().st_mtime)),
        ]
        for path in files[:MAX_TABLE_ROWS]
    ]
    more = max(0, len(files) - MAX_TABLE_ROWS)
    return {"name": "Files", "header": ("file", "bytes", "written"), "rows": rows, "empty": "None.", "more": more}


def _file_link(address: str, path: Path, folder: Path) -> str:
    return f"{address}/files/{quote(path.relative_to(folder).as_posix())}"


def system_charts(served: ServedRun) -> list[dict[str, Any]]:
    """A chart for each figure of the machine's load, over seconds of the run."""
    points: dict[str, list[tuple[float, float]]] = {}
    for i, text in enumerate(thinned(served.rows(EVENTS), MAX_POINTS)):
        row = json.loads(text)
        for name, value in flat(row):
            if name.startswith("system.") and is_number(value):
                points.setdefault(name.removeprefix("system."), []).append((float(row.get("_runtime", i)), float(value)))
    return [chart(name, [(name, points[name])], unit="second") for name in sorted(points)[:MAX_CHARTS]]


def run_charts(served: ServedRun) -> list[dict[str, Any]]:
    """A chart for each of the run's metrics: the sweep's metric, gain and harm, other evaluations; single values last."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in served.steps(most=MAX_HISTORY_ROWS):
        for name, value in flat(row):
            if not name.startswith("_") and is_number(value):
                points.setdefault(name, []).append((float(row["_step"]), float(value)))

    def rank(name: str) -> tuple[bool, bool, bool, bool, str]:
        return name != served.metric, name not in GAIN_AND_HARM, len(points[name]) == 1, not name.startswith("eval/"), name

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


def _project_link(entity: str, project: str) -> tuple[str, str]:
    return f"{entity}/{project}", f"/{entity}/{project}"


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
