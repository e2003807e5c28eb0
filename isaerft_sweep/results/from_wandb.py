"""Reads a sweep from W&B: from the cloud or a self-hosted server, also after ``wandb sync``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from isaerft_sweep.errors import ConfigError, FolderError, SpaceError
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.naming import run_id
from isaerft_sweep.paths import WANDB
from isaerft_sweep.results.reading import constraints_of, goals_of, rank, read_sweep_folder
from isaerft_sweep.results.sweep_results import RankedTrial, SweepResults
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
"""W&B's states of a run that have another name here; the others keep theirs, which is only shown."""

MAX_TRIALS = 20_000
"""Trial numbers of one sweep that are tried to find the number of a run id."""

T = TypeVar("T")
_MISSING = object()


def read_any_sweep(source: str, metric: str | None = None, prefer: Mapping[str, float] | None = None) -> SweepResults:
    """The sweep in a folder (``outputs/NAME``) or in W&B (``wandb:ENTITY/PROJECT/ID``). Raises as its reader does."""
    if source.startswith(WANDB):
        return read_wandb_sweep(source.removeprefix(WANDB), metric, prefer)
    return read_sweep_folder(Path(source), metric, prefer=prefer)


def read_wandb_sweep(path: str, metric: str | None = None, prefer: Mapping[str, float] | None = None) -> SweepResults:
    """The sweep ``entity/project/id``, ranked like a folder's, without intervals: W&B keeps no values per pair.

    Raises FolderError when W&B cannot be reached, has no such sweep, or refuses the key.
    """
    import wandb

    if path.count("/") not in (1, 2):
        raise FolderError(f"a sweep of W&B must have the form wandb:ENTITY/PROJECT/ID but got 'wandb:{path}'.")
    sweep = _call_wandb(path, lambda: wandb.Api(timeout=30).sweep(path))
    by_id = _call_wandb(path, lambda: {run.id: run for run in sweep.runs})
    runs = _call_wandb(path, lambda: [_run_data(run) for run in by_id.values()])
    remote = RemoteSweep(
        f"wandb:{path}",
        sweep.id,
        dict(sweep.config),
        runs,
        lambda run_id: _call_wandb(path, lambda: list(by_id[run_id].scan_history())),
    )
    return ranked(remote, metric, prefer)


@dataclass(frozen=True)
class RunData:
    """What W&B keeps of a run. ``created``: any text that sorts by time."""

    id: str
    name: str
    state: str
    created: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class RemoteSweep:
    """A sweep that is no folder of ours. ``source``: where it is, for people. ``sweep_id``: W&B's id of it. ``config``: the
    sweep file. ``history``: the logged rows of a run, by its id."""

    source: str
    sweep_id: str
    config: Mapping[str, Any]
    runs: Sequence[RunData]
    history: Callable[[str], list[dict[str, Any]]]


def ranked(remote: RemoteSweep, metric: str | None = None, prefer: Mapping[str, float] | None = None) -> SweepResults:
    """The sweep, ranked by ``metric`` (None: its own); ``prefer``: weights of the goals of a sweep with several."""
    config = remote.config
    constraints, goals = constraints_of(config), goals_of(config)
    own = goals[0] if goals else _metric(config)
    # a goal's direction says which of a summary's values counts
    read_as = {**{c.metric: None for c in constraints}, **{goal.name: goal.goal for goal in goals}, own.name: own.goal}
    read = SweepResults(
        name=str(config.get("name") or remote.sweep_id),
        source=remote.source,
        own=own,
        metric=read_metric_name(metric, own),
        entries=[_entry(index, run, config, read_as) for index, run in _numbered(remote.sweep_id, remote.runs).items()],
        space=_space(config),
        constraints=constraints,
        goals=goals if metric is None else (),
        prefer=prefer or {},
        sweep_id=remote.sweep_id,
        read_rows=lambda entry: _rows(remote.history(entry.record.run_id)),
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


def _run_data(run: Any) -> RunData:
    return RunData(run.id, run.name, run.state, str(run.created_at), dict(run.config), _plain(run.summary))


def _numbered(sweep_id: str, runs: Iterable[RunData]) -> dict[int, RunData]:
    """The runs by trial number, which our run ids encode: uploads come in any order. Other runs follow by age."""
    by_age = sorted(runs, key=lambda run: run.created)
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


def _entry(index: int, run: RunData, sweep: Mapping[str, Any], read_as: Mapping[str, str | None]) -> RankedTrial:
    config, summary = run.config, run.summary
    swept = parameter_names(sweep.get("parameters") or {})
    params = {key: value for key in swept if (value := value_at(config, key, _MISSING)) is not _MISSING}
    names = (*read_as, *(name for name in summary if name.startswith(("eval/", "test/", "train/"))))
    numbers = {name: number_at(summary, name, read_as.get(name)) for name in names}
    metrics = {name: value for name, value in numbers.items() if value is not None}
    runtime = summary.get("seconds", summary.get("_runtime", 0))  # _runtime is the upload's when a run was synced later
    record = TrialRecord(index, run.name, run.id, Point(params), state=cast(TrialState, STATES.get(run.state, run.state)))
    record.seconds = float(runtime) if is_number(runtime) else 0.0
    return RankedTrial(record, metrics, {}, state=record.state, device_s=record.seconds)


def _plain(summary: Any) -> dict[str, Any]:
    content = getattr(summary, "_json_dict", summary)
    return dict(content if isinstance(content, Mapping) else json.loads(content))


def _rows(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = [dict(flat(row)) for row in history]
    return [{**row, "step": row.get("_step", i), "time": row.get("_timestamp")} for i, row in enumerate(rows)]
