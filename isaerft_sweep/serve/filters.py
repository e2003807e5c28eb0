"""What ``wandb.Api`` asks of lists: MongoDB-like filters, an order, and pages."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from isaerft_sweep.serve.checks import RequestError
from isaerft_sweep.serve.runs import ServedRun
from isaerft_sweep.tracking.metric_names import number_at, value_at

T = TypeVar("T")
PAGE = 1000
DEPTH = 20

FIELDS: dict[str, Callable[[ServedRun], Any]] = {
    "name": lambda run: run.key.name,
    "display_name": lambda run: run.facts.get("displayName"),
    "state": lambda run: run.state,
    "sweep": lambda run: run.sweep,
    "group": lambda run: run.facts.get("groupName"),
    "job_type": lambda run: run.facts.get("jobType"),
    "tags": lambda run: run.facts.get("tags") or [],
    "created_at": lambda run: run.created,
    "heartbeat_at": lambda run: run.updated,
}
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda value, wanted: bool(value == wanted or (isinstance(value, list) and wanted in value)),
    "$ne": lambda value, wanted: not COMPARISONS["$eq"](value, wanted),
    "$in": lambda value, wanted: any(COMPARISONS["$eq"](value, one) for one in wanted),
    "$nin": lambda value, wanted: not COMPARISONS["$in"](value, wanted),
    "$gt": lambda value, wanted: value is not None and value > wanted,
    "$gte": lambda value, wanted: value is not None and value >= wanted,
    "$lt": lambda value, wanted: value is not None and value < wanted,
    "$lte": lambda value, wanted: value is not None and value <= wanted,
    "$exists": lambda value, wanted: (value is not None) == bool(wanted),
    "$regex": lambda value, wanted: value is not None and re.search(re.escape(str(wanted)), str(value)) is not None,
}
"""``$regex`` matches its text literally: a pattern from outside could take for ever."""


def field_of(run: ServedRun, name: str, goal: str | None = None) -> Any:
    """A run's value by W&B's name for it: ``state``, ``config.orpo.beta.value``, ``summary_metrics.eval/loss``.

    ``goal``: which value of a metric counts where the summary has several, see ``number_at``.
    """
    kind, _, rest = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower().partition(".")
    rest = name.partition(".")[2]
    if kind in FIELDS and not rest:
        return FIELDS[kind](run)
    if kind in ("summary_metrics", "summary") and rest:
        return _in_summary(run, rest, goal)
    if kind == "config" and rest:
        return _in_config(run, rest)
    raise RequestError(
        f"runs cannot be filtered or sorted by '{name}'. Valid: {', '.join(FIELDS)}, config.…, summary_metrics.…."
    )


def _in_summary(run: ServedRun, name: str, goal: str | None) -> Any:
    summary = json.loads(run.summary)
    number = number_at(summary, name, goal)
    return value_at(summary, name) if number is None else number


def _in_config(run: ServedRun, name: str) -> Any:
    """``config.a`` and ``config.a.value``; of what is nested ``config.a.b``, ``config.a.b.value``, ``config.a.value.b``."""
    values = run.config_values()
    tries = ((values, name), (json.loads(run.config), name), (values, name.removesuffix(".value")))
    return next((found for content, path in tries if (found := value_at(content, path)) is not None), None)


def matches(run: ServedRun, wanted: Any, depth: int = 0) -> bool:
    """Whether the run fits a filter. Raises RequestError on what is not supported."""
    if not isinstance(wanted, Mapping) or depth > DEPTH:
        raise RequestError(f"a filter must be a mapping of names to conditions, nested at most {DEPTH} times.")
    for name, condition in wanted.items():
        if name in ("$and", "$or"):
            if not isinstance(condition, list):
                raise RequestError(f"{name} must have a list of filters.")
            found = [matches(run, part, depth + 1) for part in condition]
            good = all(found) if name == "$and" else any(found)
        else:
            good = _fits(field_of(run, name), condition)
        if not good:
            return False
    return True


def _fits(value: Any, condition: Any) -> bool:
    if not isinstance(condition, Mapping):
        return COMPARISONS["$eq"](value, condition)
    for operator, wanted in condition.items():
        if operator not in COMPARISONS:
            raise RequestError(f"filters cannot have '{operator}'. Valid: {', '.join(COMPARISONS)}, $and, $or.")
        try:
            if not COMPARISONS[operator](value, wanted):
                return False
        except TypeError:
            return False  # values of different kinds compare to nothing
    return True


def select(runs: Sequence[ServedRun], filters: str | None, order: str | None) -> list[ServedRun]:
    """The runs that fit, in order. Raises RequestError when filters or order cannot be read."""
    try:
        wanted = json.loads(filters) if filters else {}
    except (ValueError, RecursionError) as error:
        raise RequestError(f"filters must be JSON: {error}") from error
    found = [run for run in runs if matches(run, wanted or {})]
    for part in reversed([p for p in (order or "+created_at").split(",") if p.strip()]):
        part = part.strip()
        name = part.lstrip("+-")
        # those without a value come last, whatever the direction
        goal = "maximize" if part.startswith("-") else "minimize"
        values = {id(run): _sortable(field_of(run, name, goal), name.startswith("summary")) for run in found}
        there = [run for run in found if values[id(run)] is not None]
        there.sort(key=lambda run: values[id(run)], reverse=part.startswith("-"))  # type: ignore[arg-type, return-value]
        found = there + [run for run in found if values[id(run)] is None]
    return found


def _sortable(value: Any, metric: bool) -> tuple[int, Any] | None:
    """What to sort by; None for what has no place in an order: of metrics all but finite numbers ("NaN" is a string)."""
    if isinstance(value, str):
        return None if metric else (1, value)
    return (0, value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def page(found: Sequence[T], after: str | None, first: int | None, view: Callable[[T], Any]) -> dict[str, Any]:
    """A GraphQL connection over part of ``found``; the cursor is a place in it."""
    if after and not after.isdecimal():
        raise RequestError(f"the cursor '{after[:40]}' is not one of this server's.")
    begin = int(after or 0)
    size = PAGE if first is None else max(0, min(first, PAGE))
    end = min(begin + size, len(found))
    edges = [{"node": view(one), "cursor": str(begin + i + 1)} for i, one in enumerate(found[begin:end])]
    more = end < len(found)
    info = {"endCursor": str(end) if edges else None, "hasNextPage": more}
    return {"edges": edges, "pageInfo": info, "totalCount": len(found)}
