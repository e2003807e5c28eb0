"""Reads a sweep from W&B: from the cloud or a self-hosted server, also after ``wandb sync``."""

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
"""W&B's states of a run that have another name here."""

MAX_TRIALS = 20_000
"""Trial numbers of one sweep that are tried to find the number of a run id."""

T = TypeVar("T")
_MISSING = object()


def read_wandb_sweep(path: str, metric: str | None = None) -> ReadSweep:
    """The sweep ``entity/project/id``, ranked like a folder's, without intervals: W&B keeps no values per pair.

    Raises FolderError when W&B cannot be reached, has no such sweep, or refuses the key.
    """
    import wandb

    if path.count("/") not in (1, 2):
        raise FolderError(f"a sweep of W&B must have the form wandb:ENTITY/PROJECT/ID but got 'wandb:{path}'.")
    sweep = _call_wandb(path, lambda: wandb.Api(timeout=30).sweep(path))
    config = dict(sweep.config)
    own = _metric(config)
    numbered = _call_wandb(path, lambda: _numbered(sweep.id, sweep.runs))
    entries = _call_wandb(path, lambda: [_entry(i, run, config, own) for i, run in numbered.items()])
    runs = {run.id: run for run in numbered.values()}
    read = ReadSweep(
        name=str(config.get("name") or sweep.id),
        source=f"wandb:{path}",
        own=own,
        metric=read_metric_name(metric, own),
        entries=entries,
        space=_space(config),
        sweep_id=sweep.id,
        read_rows=lambda entry: _call_wandb(path, lambda: _rows(runs[entry.record.run_id])),
    )
    rank(read)
    return read


def _call_wandb(path: str, request: Callable[[], T]) -> T:
    """W&B's answer. wandb raises many kinds of error; each becomes a FolderError that says what to do."""
    try:
        return request()
    except Exception as error:
        backend = os.environ.get("WANDB_BASE_URL", "W&B's cloud")
        reason = (str(error) or repr(error)).splitlines()[0]
        raise FolderError(
            f"the sweep {path} could not be read from {backend}: {reason}. Check its name, "
            "the network and the key (`wandb login`, WANDB_API_KEY, WANDB_BASE_URL for your own server); "
            "or use the sweep's folder instead."
        ) from error


def _numbered(sweep_id: str, runs: Any) -> dict[int, Any]:
    """The runs by trial number, which our run ids encode: uploads come in any order. Other runs follow by age."""
    by_age = sorted(runs, key=lambda run: str(run.created_at))
    numbers = {run_id(sweep_id, index): index for index in range(MAX_TRIALS)}
    numbered = {numbers[run.id]: run for run in by_age if run.id in numbers}
    others = [run for run in by_age if run.id not in numbers]
    return dict(sorted({**numbered, **{max(numbered, default=-1) + i: run for i, run in enumerate(others, 1)}}.items()))


def _metric(config: Mapping[str, Any]) -> Metric:
    try:
        return read_sweep({**config, "parameters": {"orpo.beta": {"value": 1.0}}, "method": "random"}).metric
    except (SpaceError, ConfigError):
        metric = config.get("metric") or {"name": "eval/log_odds_chosen", "goal": "maximize"}
        return Metric(str(metric.get("name", "")), str(metric.get("goal", "minimize")))


def _space(config: Mapping[str, Any]) -> Mapping[str, Distribution]:
    try:
        return read_sweep(config).parameters
    except (SpaceError, ConfigError):
        return {}  # a sweep of unknown parameters is still readable; only the edges of its space are unknown


def _entry(index: int, run: Any, sweep: Mapping[str, Any], own: Metric) -> Entry:
    config, summary = dict(run.config), _plain(run.summary)
    swept = parameter_names(sweep.get("parameters") or {})
    params = {key: value for key in swept if (value := value_at(config, key, _MISSING)) is not _MISSING}
    names = (own.name, *(name for name in summary if name.startswith(("eval/", "train/"))))
    numbers = {name: number_at(summary, name, own.goal if name == own.name else None) for name in names}
    metrics = {name: value for name, value in numbers.items() if value is not None}
    runtime = summary.get("seconds", summary.get("_runtime", 0))  # _runtime is the upload's when a run was synced later
    record = TrialRecord(index, run.name, run.id, Point(params), state=STATES.get(run.state, run.state))
    record.seconds = float(runtime) if is_number(runtime) else 0.0
    return Entry(record, metrics, {}, state=record.state, device_s=record.seconds)


def _plain(summary: Any) -> dict[str, Any]:
    content = getattr(summary, "_json_dict", summary)
    return dict(content if isinstance(content, Mapping) else json.loads(content))


def _rows(run: Any) -> list[dict[str, Any]]:
    rows = [dict(flat(row)) for row in run.scan_history()]
    return [{**row, "step": row.get("_step", i), "time": row.get("_timestamp")} for i, row in enumerate(rows)]
