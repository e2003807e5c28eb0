"""Reads W&B sweep files strictly: each error names the key, its value and the right form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isaerft_sweep.errors import ConfigError, SpaceError, suggest
from isaerft_sweep.metrics import LESS_IS_BETTER, METRICS
from isaerft_sweep.search.constraints import Constraint, read_constraints, violation
from isaerft_sweep.search.distributions import Conditional, Distribution
from isaerft_sweep.search.parameters import check_conditional, read_parameter
from isaerft_sweep.search.strict_yaml import read_yaml
from isaerft_sweep.specs import split_key

METHODS = ("grid", "random", "bayes")
GOALS = ("minimize", "maximize")
TEXT_KEYS = ("program", "name", "description", "project", "entity")
SEARCH_KEYS = ("method", "metric", "metrics", "parameters", "constraints", "early_terminate", "run_cap", "scheduler")
TOP_KEYS = ("command", *SEARCH_KEYS, *TEXT_KEYS)
ENGINES = ("wandb", "optuna", "ax")
"""Search engines of `wandb sweep-scheduler`."""
SCHEDULER_KEYS = ("engine", "source", "optimizer", "search_space")
METRIC_KEYS = ("name", "goal", "target", "impute", "impute_while_running")
EARLY_KEYS = {"hyperband": ("type", "min_iter", "max_iter", "eta", "s", "strict"), "median": ("type", "min_iter")}
"""Keys of ``early_terminate`` by its type. W&B itself has only hyperband."""


@dataclass(frozen=True)
class Metric:
    """The metric that a sweep optimises, one of ``metrics.METRICS``, and its direction."""

    name: str
    goal: str

    @property
    def sign(self) -> int:
        """+1 when more is better, −1 when less is."""
        return 1 if self.goal == "maximize" else -1


@dataclass(frozen=True)
class SweepDefinition:
    """A sweep file's content, checked. ``parameters`` maps dotted config keys to their distributions.

    ``goals``: all metrics of a sweep with several, ``metric`` first; empty for one. ``constraints``: bounds of other
    metrics; trials that break one rank behind all others. ``target``: once a trial's metric
    reaches it, no further trial starts. ``notes``: remarks to print, such as truncated distributions.
    """

    method: str
    metric: Metric
    parameters: Mapping[str, Distribution]
    run_cap: int | None = None
    name: str | None = None
    project: str | None = None
    entity: str | None = None
    target: float | None = None
    early_terminate: Mapping[str, Any] | None = None
    constraints: tuple[Constraint, ...] = ()
    goals: tuple[Metric, ...] = ()
    command: tuple[str, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def violation(self, metrics: Mapping[str, float]) -> float:
        """How far a trial's metrics break the constraints; 0 when they meet all."""
        return violation(self.constraints, metrics)

    def others(self, metrics: Mapping[str, float]) -> tuple[float, ...] | None:
        """A trial's values of the goals after the first, larger is better; None when one is missing."""
        values = [metrics.get(goal.name) for goal in self.goals[1:]]
        if any(value is None or not math.isfinite(value) for value in values):
            return None
        return tuple(goal.sign * value for goal, value in zip(self.goals[1:], values, strict=True) if value is not None)

    def reached_by(self, value: float | None) -> bool:
        """Whether ``value`` of the metric is the target or better. False without a target."""
        sign = self.metric.sign
        return self.target is not None and value is not None and sign * value >= sign * self.target


def read_sweep_file(path: Path) -> SweepDefinition:
    """Read and check a W&B sweep file. Raises SpaceError that names the file, the key, its value and the right form."""
    raw = read_yaml(path)
    try:
        return read_sweep(raw)
    except (SpaceError, ConfigError) as error:
        raise SpaceError(f"{path}: {error}") from error


def read_sweep(raw: Any, ours: bool = True) -> SweepDefinition:
    """Check a sweep file's content ``raw``, plain data.

    ``ours``: whether the sweep runs this package's trials; otherwise any names of parameters and metrics are valid.
    """
    if not isinstance(raw, Mapping):
        raise SpaceError("a sweep file must be a mapping with method, metric and parameters.")
    for key in raw:
        if key not in TOP_KEYS:
            raise SpaceError(f"unknown key '{key}'." + suggest(str(key), TOP_KEYS))
    for key in TEXT_KEYS:
        if not isinstance(raw.get(key, ""), str):
            raise SpaceError(f"{key} must be text but got {raw[key]!r} ({type(raw[key]).__name__}).")
    method = raw.get("method")
    if method not in METHODS:
        raise SpaceError(f"method must be one of {', '.join(METHODS)} but got {method!r}.")
    parameters = read_parameters(raw.get("parameters"), ours=ours)
    check_conditional(parameters)
    if method == "grid":
        check_grid(parameters)
    goals = read_goals(raw, ours)
    return SweepDefinition(
        method=method,
        metric=goals[0],
        goals=goals if len(goals) > 1 else (),
        parameters=parameters,
        run_cap=_read_run_cap(raw.get("run_cap")),
        name=raw.get("name"),
        project=raw.get("project"),
        entity=raw.get("entity"),
        target=_read_target(raw.get("metric")),
        early_terminate=_read_early_terminate(raw.get("early_terminate")),
        constraints=read_constraints(raw.get("constraints"), ours),
        command=_read_command(raw.get("command")),
        raw=dict(raw),
        notes=_read_scheduler(raw.get("scheduler"), str(method)),
    )


def _read_scheduler(raw: Any, method: str) -> tuple[str, ...]:
    """A remark on W&B's block for `wandb sweep-scheduler`, whose place this package's own search takes."""
    if raw is None:
        return ()
    if not isinstance(raw, Mapping) or raw.get("engine") not in ENGINES:
        raise SpaceError(f"scheduler.engine must be one of {', '.join(ENGINES)} but got {raw!r}.")
    for key in raw:
        if key not in SCHEDULER_KEYS:
            raise SpaceError(f"scheduler has an unknown key '{key}'." + suggest(str(key), SCHEDULER_KEYS))
    if code := [key for key in SCHEDULER_KEYS[1:] if raw.get(key) is not None]:
        raise SpaceError(
            f"scheduler.{code[0]} names Python code of your own that chooses the points, which only `wandb sweep-scheduler` "
            "runs, with W&B's server. Leave it out: the file's method and parameters decide here."
        )
    return (f"scheduler.engine {raw['engine']}: the search is this package's own, method {method}",)


def read_parameters(raw: Any, prefix: str = "", ours: bool = True) -> dict[str, Distribution]:
    """The distributions of a ``parameters`` block, by dotted key; nested blocks are flattened."""
    if not isinstance(raw, Mapping) or not raw:
        raise SpaceError(f"{prefix or 'parameters'} must be a mapping of parameter names but got {raw!r}.")
    parameters: dict[str, Distribution] = {}
    for name, block in raw.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(block, Mapping) and "parameters" in block:
            if set(block) != {"parameters"}:
                others = ", ".join(sorted(str(other) for other in block if other != "parameters"))
                raise SpaceError(f"{key}: a nested block must hold nothing but 'parameters' but also has {others}.")
            new = read_parameters(block["parameters"], key, ours)
        else:
            if ours:
                split_key(key)
            new = {key: read_parameter(key, block)}
        for duplicate in new.keys() & parameters.keys():
            raise SpaceError(f"{duplicate} is given twice, with a dot and as a nested block. Leave one of them out.")
        parameters |= new
    return parameters


def check_grid(parameters: Mapping[str, Distribution]) -> None:
    """Raise SpaceError unless every parameter has finitely many values."""
    for key, distribution in parameters.items():
        if isinstance(distribution, Conditional):
            raise SpaceError(
                f"{key}: method grid takes no parameter with `by`. Use random or bayes, or a file for each case."
            )
        if distribution.size == math.inf:
            raise SpaceError(
                f"{key}: method grid needs a finite set but got distribution {getattr(distribution, 'kind', '?')}. "
                "Give `values: [...]`, whole numbers, or a q_ distribution; or use method random or bayes."
            )


def read_goals(raw: Mapping[str, Any], ours: bool = True) -> tuple[Metric, ...]:
    """The metrics of ``metric``, or of ``metrics``, W&B's list of several."""
    if "metrics" not in raw:
        return (_read_metric(raw.get("metric"), ours),)
    blocks = raw["metrics"]
    form = "metrics: [{name: eval/log_odds_chosen, goal: maximize}, {name: eval/kl_base, goal: minimize}]"
    if "metric" in raw:
        raise SpaceError("metric and metrics must not both be given. Leave one of them out.")
    if not isinstance(blocks, list) or not blocks:
        raise SpaceError(
            f"metrics must be a list of metrics, each with a name and a goal, but got {blocks!r}. Right form: {form}."
        )
    for block in blocks:
        if not isinstance(block, Mapping) or set(block) - {"name", "goal"}:
            raise SpaceError(f"metrics: each must have a name and a goal alone but got {block!r}. Right form: {form}.")
    goals = tuple(_read_metric(block, ours) for block in blocks)
    if len({goal.name for goal in goals}) < len(goals):
        raise SpaceError(f"metrics must be different from each other but got {[goal.name for goal in goals]}.")
    if len(goals) > 1 and raw.get("early_terminate"):
        raise SpaceError("early_terminate must go with a single metric: leave it out, or give metric instead of metrics.")
    return goals


def read_metric_name(name: str | None, own: Metric) -> Metric:
    """The metric to rank by: ``name`` with its direction, or the sweep's own for None."""
    if name is None or name == own.name:
        return own
    if name not in METRICS:
        raise SpaceError(f"metric '{name}' is not logged by any trial." + suggest(name, METRICS))
    return Metric(name, "minimize" if name.partition("/")[2] in LESS_IS_BETTER else "maximize")


def _read_metric(raw: Any, ours: bool) -> Metric:
    if raw is None and not ours:
        return Metric("", "minimize")  # W&B requires one for bayes and early stopping only
    form = "metric: {name: eval/log_odds_chosen, goal: maximize}"
    if not isinstance(raw, Mapping) or "name" not in raw:
        raise SpaceError(f"metric must have a name and a goal but got {raw!r}. Right form: {form}.")
    name, goal = raw["name"], raw.get("goal", "minimize")
    if not isinstance(name, str) or (ours and name not in METRICS):
        raise SpaceError(f"metric.name '{name}' is not logged by any trial." + suggest(str(name), METRICS))
    if goal not in GOALS:
        raise SpaceError(f"metric.goal must be one of {', '.join(GOALS)} but got {goal!r}.")
    for key in raw:
        if key not in METRIC_KEYS:
            raise SpaceError(
                f"metric has an unknown key '{key}'." + suggest(str(key), METRIC_KEYS) + f" Right form: {form}."
            )
    for key in ("impute", "impute_while_running"):
        if raw.get(key, "worst") != "worst":
            raise SpaceError(
                f"metric.{key} must be worst or left out but got {raw[key]!r}: a trial that diverges, and one that still "
                "runs, count as the worst."
            )
    return Metric(name, goal)


def _read_target(metric: Any) -> float | None:
    """W&B: no further run is started once a run has reached ``metric.target``."""
    target = metric.get("target") if isinstance(metric, Mapping) else None
    if target is None:
        return None
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not math.isfinite(target):
        raise SpaceError(f"metric.target must be a finite number but got {target!r}.")
    return float(target)


def _read_command(raw: Any) -> tuple[str, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list) or not all(isinstance(part, (str, int, float)) for part in raw):
        raise SpaceError(
            f"command must be a list of words but got {raw!r}. Right form: "
            'command: ["${env}", "${interpreter}", "-m", "isaerft_sweep.launch", "${args_no_hyphens}"].'
        )
    return tuple(str(part) for part in raw)


def _read_run_cap(raw: Any) -> int | None:
    if raw is None:
        return None
    if isinstance(raw, bool) or not isinstance(raw, int) or raw < 1:
        raise SpaceError(f"run_cap must be a whole number of at least 1 but got {raw!r}.")
    return raw


def _read_early_terminate(raw: Any) -> Mapping[str, Any] | None:
    if raw is None:
        return None
    form = "early_terminate: {type: hyperband, min_iter: 3}"
    if not isinstance(raw, Mapping) or raw.get("type") not in EARLY_KEYS:
        raise SpaceError(f"early_terminate.type must be hyperband or median but got {raw!r}. Right form: {form}.")
    keys = EARLY_KEYS[raw["type"]]
    for key, value in raw.items():
        if key not in keys:
            raise SpaceError(f"early_terminate has an unknown key '{key}'." + suggest(str(key), keys))
        requirement = _unmet_requirement(key, value)
        if requirement:
            raise SpaceError(f"early_terminate.{key} must be {requirement} but got {value!r}.")
    if raw["type"] == "median" and "min_iter" not in raw:
        raise SpaceError(f"early_terminate must have min_iter but got {dict(raw)}. {form.replace('hyperband', 'median')}.")
    if {"min_iter", "max_iter", "s"} & set(raw) not in ({"min_iter"}, {"max_iter", "s"}):
        raise SpaceError(f"early_terminate must have either min_iter, or max_iter and s, but got {dict(raw)}. {form}.")
    return dict(raw)


def _unmet_requirement(key: str, value: Any) -> str:
    """What the value of early_terminate's ``key`` must be; empty when it is that."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if key in ("min_iter", "max_iter", "s") and not (number and value >= 1 and float(value).is_integer()):
        return "a whole number of at least 1"
    if key == "eta" and not (number and value > 1):
        return "a number above 1"
    return "true or false" if key == "strict" and not isinstance(value, bool) else ""
