"""A served sweep's page: that of `isaerft-sweep report`, from what the server holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from isaerft_sweep.results.from_wandb import RemoteSweep, RunData, ranked
from isaerft_sweep.serve.caller import thinned
from isaerft_sweep.serve.run_state import SweepRunState
from isaerft_sweep.serve.runs import HISTORY, ServedRun, rows_in
from isaerft_sweep.serve.sweeps import ServedSweep

DRAWN = 100
"""Runs whose curves are drawn, at most."""
MAX_ROWS = 2000
"""Rows of a run's history that are read for its curves, evenly spaced."""
END = ((SweepRunState.FINISHED, "Stop"), (SweepRunState.CANCELED, "Cancel"))
"""A sweep that is stopped starts no more runs; one that is canceled also ends those that run."""
ACTIONS = {
    SweepRunState.RUNNING: ((SweepRunState.PAUSED, "Pause"), *END),
    SweepRunState.PAUSED: ((SweepRunState.RUNNING, "Resume"), *END),
}
"""States that a user can set, by the sweep's own, with a button's label."""


def can_draw() -> bool:
    """Whether the packages of the extra ``report`` are installed."""
    return find_spec("plotly") is not None


def snapshot(sweep: ServedSweep, runs: list[ServedRun]) -> RemoteSweep:
    """The sweep now: what another thread may read while the server goes on. Only the first ``DRAWN`` runs have rows."""
    logs = {run.key.name: (run.path, run.length) for run in runs[:DRAWN] if run.line_counts[HISTORY]}

    def history(run_id: str) -> list[dict[str, Any]]:
        rows = rows_in(*logs[run_id], HISTORY) if run_id in logs else ()
        return [{"_step": i, **json.loads(text)} for i, text in thinned(list(enumerate(rows)), MAX_ROWS)]

    source = f"wandb:{sweep.entity}/{sweep.project}/{sweep.id}"
    return RemoteSweep(source, sweep.id, dict(sweep.raw), [_data(sweep, run) for run in runs], history)


def _data(sweep: ServedSweep, run: ServedRun) -> RunData:
    config = {**run.config_values(), **sweep.point_of(run)}
    name = str(run.metadata.get("displayName") or run.key.name)
    return RunData(run.key.name, name, str(run.state), f"{run.created:020.3f}", config, json.loads(run.summary))


def render(taken: RemoteSweep, surroundings: Callable[[dict[int, str]], Any]) -> str:
    """The page. ``surroundings``: from the runs' ids by trial number to what the server adds to the page (``Served``)."""
    from isaerft_sweep.results.report.gather import gather
    from isaerft_sweep.results.report.page import render as render_report

    sweep = ranked(taken)
    if len(taken.runs) > DRAWN:
        sweep.problems.append(f"Curves are drawn of {DRAWN} of {len(taken.runs)} runs.")
    ids = {entry.record.index: entry.record.run_id for entry in sweep.entries}
    return render_report(gather(sweep), surroundings(ids))
