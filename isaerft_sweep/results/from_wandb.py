"""Reads a sweep from W&B: the cloud's, one's own server's, or what ``wandb sync`` has put there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from isaerft_sweep.errors import ConfigError, FolderError, SpaceError
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.naming import run_id
from isaerft_sweep.results.reading import Entry, ReadSweep, rank
from isaerft_sweep.search.distributions import Distribution
from isaerft_sweep.search.sampler import Point
from isaerft_sweep.search.sweep_file import Metric, read_metric_name, read_sweep
from isaerft_sweep.tracking.metric_names import flat, is_number, number_at, parameter_names, value_at

STATES = {
    "finished": TrialState.COMPLETED,
    "killed": "stopped",
    "preempting": "stopped",
    "preempted": "stopped",
    "crashed": "failed",
}
"""W&B's states of a run in our words; the others are the same."""

MOST_TRIALS = 20_000
"""Of one sweep, to tell a run's number from its id."""

T = TypeVar("T")
_MISSING = object()


def read_wandb_sweep(path: str, metric: str | None = None) -> ReadSweep:
    """The sweep ``entity/project/id``, ranked like a folder's, without intervals: W&B keeps no values per pair.

    Raises FolderError when W&B cannot be reached, does not know the sweep, or wants a key.
    """
    import wandb

    if path.count("/") not in (1, 2):
        raise FolderError(f"a sweep of W&B must be given as wandb:ENTITY/PROJECT/ID but got 'wandb:{path}'.")
    sweep = _asked(path, lambda: wandb.Api(timeout=30).sweep(path))
    config = dict(sweep.config)
    own = _metric(config)
    numbered = _asked(path, lambda: _numbered(sweep.id, sweep.runs))
    entries = _asked(path, lambda: [_entry(i, run, config, own) for i, run in numbered.items()])
    runs = {run.id: run for run in numbered.values()}
    read = ReadSweep(
        name=str(config.get("name") or sweep.id),
        source=f"wandb:{path}",
        own=own,
        metric=read_metric_name(metric, own),
        entries=entries,
        space=_space(config),
        sweep_id=sweep.id,
        read_rows=lambda entry: _asked(path, lambda: _rows(runs[entry.record.run_id])),
    )
    rank(read)
    return read


def _asked(path: str, ask: Callable[[], T]) -> T:
    """What W&B answers. wandb raises many kinds of error; all of them become one that says what to do."""
    try:
        return ask()
    except Exception as error:
        where = os.environ.get("WANDB_BASE_URL", "W&B's cloud")
        reason = (str(error) or repr(error)).splitlines()[0]
        raise FolderError(
            f"the sweep {path} could not be read from {where}: {reason}. Check its name, "
            "the network and the key (`wandb login`, WANDB_API_KEY, WANDB_BASE_URL for a server of one's own); "
            "or give the sweep's folder instead."
        ) from error


def _numbered(sweep_id: str, runs: Any) -> dict[int, Any]:
    """The runs by their trials' numbers, which the ids of our runs tell: uploads come in any order. Others follow by age."""
    by_age = sorted(runs, key=lambda run: str(run.created_at))
    ours = {run_id(sweep_id, index): index for index in range(MOST_TRIALS)}
    found = {ours[run.id]: run for run in by_age if run.id in ours}
    rest = [run for run in by_age if run.id not in ours]
    return dict(sorted({**found, **{max(found, default=-1) + i: run for i, run in enumerate(rest, 1)}}.items()))


def _metric(config: Mapping[str, Any]) -> Metric:
    try:
        return read_sweep({**config, "parameters": {"orpo.beta": {"value": 1.0}}, "method": "random"}).metric
    except (SpaceError, ConfigError):
        asked = config.get("metric") or {"name": "eval/log_odds_chosen", "goal": "maximize"}
        return Metric(str(asked.get("name", "")), str(asked.get("goal", "minimize")))


def _space(config: Mapping[str, Any]) -> Mapping[str, Distribution]:
    try:
        return read_sweep(config).parameters
    except (SpaceError, ConfigError):
        return {}  # a sweep of other parameters can be read all the same; only the edges of its space are not known


def _entry(index: int, run: Any, sweep: Mapping[str, Any], own: Metric) -> Entry:
    config, summary = dict(run.config), _plain(run.summary)
    swept = parameter_names(sweep.get("parameters") or {})
    params = {key: value for key in swept if (value := value_at(config, key, _MISSING)) is not _MISSING}
    known = (own.name, *(name for name in summary if name.startswith(("eval/", "train/"))))
    found = {name: number_at(summary, name, own.goal if name == own.name else None) for name in known}
    metrics = {name: value for name, value in found.items() if value is not None}
    runtime = summary.get("seconds", summary.get("_runtime", 0))  # W&B's is that of the upload when a run came later
    record = TrialRecord(index, run.name, run.id, Point(params), state=STATES.get(run.state, run.state))
    record.seconds = float(runtime) if is_number(runtime) else 0.0
    return Entry(record, metrics, {}, state=record.state, device_s=record.seconds)


def _plain(summary: Any) -> dict[str, Any]:
    found = getattr(summary, "_json_dict", summary)
    return dict(found if isinstance(found, Mapping) else json.loads(found))


def _rows(run: Any) -> list[dict[str, Any]]:
    rows = [dict(flat(row)) for row in run.scan_history()]
    return [{**row, "step": row.get("_step", i), "time": row.get("_timestamp")} for i, row in enumerate(rows)]
