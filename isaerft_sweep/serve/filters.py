"""Filters, orders and pages of lists, as ``wandb.Api`` requests them. Filters are MongoDB-like."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any, TypeVar

import regex

from isaerft_sweep.serve import query_cost
from isaerft_sweep.serve.checks import RequestError
from isaerft_sweep.serve.runs import ServedRun
from isaerft_sweep.tracking.metric_names import number_at, value_at

T = TypeVar("T")
Field = Callable[[str], Any]
"""Returns an item's value by W&B's name of the field. Raises RequestError for an unknown field."""
PAGE_SIZE, FILES_PAGE_SIZE = 100, 2000
"""The most items, and the most files, in one response; clients request the rest page by page."""
MAX_DEPTH = 20
MAX_FILTER, MAX_ORDER = 20_000, 1000
"""Length of a filter, and of an order, in characters."""
REGEX_S = 0.05
"""Seconds that a pattern may search in one value: some would never end."""

FIELDS: dict[str, Callable[[ServedRun], Any]] = {
    "name": lambda run: run.key.name,
    "display_name": lambda run: run.metadata.get("displayName") or run.key.name,
    "state": lambda run: run.state,
    "sweep": lambda run: run.sweep,
    "group": lambda run: run.metadata.get("groupName"),
    "group_name": lambda run: run.metadata.get("groupName"),
    "job_type": lambda run: run.metadata.get("jobType"),
    "tags": lambda run: run.metadata.get("tags") or [],
    "notes": lambda run: run.metadata.get("notes"),
    "description": lambda run: run.metadata.get("description"),
    "host": lambda run: run.metadata.get("host"),
    "commit": lambda run: run.metadata.get("commit"),
    "created_at": lambda run: run.created,
    "updated_at": lambda run: run.updated,
    "heartbeat_at": lambda run: run.updated,
}
TIMES = ("created_at", "updated_at", "heartbeat_at")
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda value, operand: bool(value == operand or (isinstance(value, list) and operand in value)),
    "$ne": lambda value, operand: not COMPARISONS["$eq"](value, operand),
    "$in": lambda value, operand: any(COMPARISONS["$eq"](value, option) for option in operand),
    "$nin": lambda value, operand: not COMPARISONS["$in"](value, operand),
    "$gt": lambda value, operand: value is not None and value > operand,
    "$gte": lambda value, operand: value is not None and value >= operand,
    "$lt": lambda value, operand: value is not None and value < operand,
    "$lte": lambda value, operand: value is not None and value <= operand,
    "$exists": lambda value, operand: (value is not None) == bool(operand),
}
GROUPS = ("$and", "$or", "$nor")


@lru_cache(maxsize=1024)
def snake(name: str) -> str:
    """``created_at`` of ``createdAt``, ``run_id`` of ``runID``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def field_of(run: ServedRun, name: str, goal: str | None = None) -> Any:
    """A run's value by W&B's name of the field: ``state``, ``config.orpo.beta.value``, ``summary_metrics.eval/loss``.

    ``goal``: decides between several values of a metric in the summary, see ``number_at``.
    """
    kind, _, rest = name.partition(".")
    kind = snake(kind)
    if kind in FIELDS and not rest:
        return FIELDS[kind](run)
    if kind in ("summary_metrics", "summary") and rest:
        return _in_summary(run, rest, goal)
    if kind == "config" and rest:
        return _in_config(run, rest)
    raise RequestError(
        f"runs cannot be filtered or sorted by '{name[:200]}'. Valid: {', '.join(FIELDS)}, config.…, summary_metrics.…."
    )


def _in_summary(run: ServedRun, name: str, goal: str | None) -> Any:
    summary = json.loads(run.summary)
    number = number_at(summary, name, goal)
    return value_at(summary, name) if number is None else number


def _in_config(run: ServedRun, name: str) -> Any:
    """``config.a``, ``config.a.value``; of nested values ``config.a.b``, ``config.a.b.value``, ``config.a.value.b``."""
    values = run.config_values()
    lookups = ((values, name), (json.loads(run.config), name), (values, name.removesuffix(".value")))
    return next((value for config, path in lookups if (value := value_at(config, path)) is not None), None)


def matches(field: Field, conditions: Any, depth: int = 0) -> bool:
    """Whether an item matches a filter. Raises RequestError on an operator or field that is not supported.

    Args:
        field: returns the item's value of a field.
        conditions: the filter, a mapping of field names to conditions.
        depth: how deeply the filter is nested in another.
    """
    if not isinstance(conditions, Mapping) or depth > MAX_DEPTH:
        raise RequestError(f"a filter must be a mapping of names to conditions, nested at most {MAX_DEPTH} times.")
    for name, condition in conditions.items():
        if name in GROUPS:
            if not isinstance(condition, list):
                raise RequestError(f"{name} must have a list of filters.")
            results = [matches(field, part, depth + 1) for part in condition]
            matched = all(results) if name == "$and" else any(results) == (name == "$or")
        else:
            matched = _holds(name, field(name), condition, depth)
        if not matched:
            return False
    return True


def _holds(name: str, value: Any, condition: Any, depth: int) -> bool:
    if snake(name) in TIMES:
        value, condition = math.floor(value), _in_seconds(name, condition)
    if not isinstance(condition, Mapping):
        return COMPARISONS["$eq"](value, condition)
    return all(_operator_holds(name, value, condition, operator, depth) for operator in condition if operator != "$options")


def _operator_holds(name: str, value: Any, condition: Mapping[str, Any], operator: str, depth: int) -> bool:
    operand = condition[operator]
    if operator == "$not" and depth < MAX_DEPTH:
        return not _holds(name, value, operand, depth + 1)
    if operator == "$regex":
        return _regex_matches(operand, condition.get("$options", ""), value)
    if operator not in COMPARISONS:
        raise RequestError(
            f"filters cannot have '{operator[:80]}'. Valid: {', '.join(COMPARISONS)}, $regex, $not, {', '.join(GROUPS)}."
        )
    try:
        return COMPARISONS[operator](value, operand)
    except TypeError:
        return False  # values of different types do not compare


def _regex_matches(pattern: Any, options: Any, value: Any) -> bool:
    """MongoDB's ``$regex``. Raises RequestError when the pattern is not valid or takes too long."""
    flags = {"i": regex.IGNORECASE, "m": regex.MULTILINE, "s": regex.DOTALL, "x": regex.VERBOSE}
    if not isinstance(pattern, str) or len(pattern) > 500 or not isinstance(options, str) or set(options) - set(flags):
        raise RequestError("$regex must be a pattern of at most 500 characters, $options some of i, m, s and x.")
    values = value if isinstance(value, list) else [value]
    try:
        compiled = regex.compile(pattern, sum(flags[letter] for letter in set(options)))
        return any(compiled.search(text, timeout=REGEX_S) is not None for text in values if isinstance(text, str))
    except (regex.error, OverflowError, RecursionError) as error:
        raise RequestError(f"$regex must be a regular expression but got '{pattern[:80]}': {error}.") from error
    except TimeoutError as error:
        raise RequestError(f"$regex '{pattern[:80]}' takes too long. Choose a simpler one.") from error


def _in_seconds(name: str, condition: Any) -> Any:
    """Convert the times in a condition to seconds since the epoch. Raises RequestError when one is not valid."""
    if isinstance(condition, Mapping):
        return {key: part if key == "$exists" else _in_seconds(name, part) for key, part in condition.items()}
    if isinstance(condition, list):
        return [_in_seconds(name, part) for part in condition]
    if condition is None or (isinstance(condition, (int, float)) and not isinstance(condition, bool)):
        return condition
    try:
        parsed = datetime.fromisoformat(condition)
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(
            f"{name} must be compared with a time like 2026-11-27 or 2026-11-27T18:30:00Z but got {str(condition)[:80]!r}."
        ) from error


def read_filter(filters: str | None) -> Mapping[str, Any]:
    """Parse a filter. Raises RequestError."""
    if filters and len(filters) > MAX_FILTER:
        raise RequestError(f"filters may have at most {MAX_FILTER} characters but got {len(filters)}.")
    try:
        conditions = json.loads(filters) if filters else {}
    except (ValueError, RecursionError) as error:
        raise RequestError(f"filters must be JSON: {error}") from error
    if not isinstance(conditions or {}, Mapping):
        raise RequestError("filters must be a mapping of names to conditions.")
    return conditions or {}


def select(runs: Sequence[ServedRun], filters: str | None, order: str | None) -> list[ServedRun]:
    """The runs that match the filter, in order. Raises RequestError when filter or order is not valid."""
    conditions = read_filter(filters)
    if order and len(order) > MAX_ORDER:
        raise RequestError(f"order may have at most {MAX_ORDER} characters but got {len(order)}.")
    query_cost.spend(len(runs) * (1 + (filters or "").count(":")) // query_cost.CHECKS_PER_UNIT)
    selected = [run for run in runs if matches(partial(field_of, run), conditions)]
    for part in reversed(_parts(order or "+created_at")):
        name = part.lstrip("+-")
        # Runs without a value come last in both directions.
        goal = "maximize" if part.startswith("-") else "minimize"
        values = {id(run): _sortable(field_of(run, name, goal), name.startswith("summary")) for run in selected}
        with_value = [run for run in selected if values[id(run)] is not None]
        with_value.sort(key=lambda run: values[id(run)], reverse=part.startswith("-"))  # type: ignore[arg-type, return-value]
        selected = with_value + [run for run in selected if values[id(run)] is None]
    return selected


def _parts(order: str) -> list[str]:
    """Split an order into its fields. The name of a metric may contain commas."""
    fields: list[str] = []
    for part in re.split(r",(?=\s*[+-])", order):
        single = part.strip().lstrip("+-").startswith(("summary", "config"))
        fields += [part] if single else part.split(",")
    return [field.strip() for field in fields if field.strip()]


def _sortable(value: Any, metric: bool) -> tuple[int, Any] | None:
    """A sort key; None for a value without an order, such as a metric that is not a finite number ("NaN" is a string)."""
    if isinstance(value, str):
        return None if metric else (1, value)
    return (0, value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def page(
    items: Sequence[T], after: str | None, first: int | None, view: Callable[[T], Any], max_size: int = PAGE_SIZE
) -> dict[str, Any]:
    """A GraphQL connection with one page of items. Raises RequestError when the cursor is not valid.

    Args:
        items: all items, in order.
        after: the cursor of the previous page: how many items to skip.
        first: the requested size of the page.
        view: turns an item into a node.
        max_size: the largest page.
    """
    if after and not after.isdecimal():
        raise RequestError(f"the cursor '{after[:40]}' is not one of this server's.")
    begin = int(after or 0)
    size = max_size if first is None else max(0, min(first, max_size))
    end = min(begin + size, len(items))
    edges = [{"node": view(item), "cursor": str(begin + i + 1)} for i, item in enumerate(items[begin:end])]
    more = end < len(items)
    info = {"endCursor": str(end) if edges else None, "hasNextPage": more}
    return {"edges": edges, "pageInfo": info, "totalCount": len(items)}
