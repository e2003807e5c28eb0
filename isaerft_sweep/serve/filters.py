"""What ``wandb.Api`` asks of lists: MongoDB-like filters, an order, and pages."""

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
"""A thing's value by W&B's name for it. Raises RequestError on a name that there is not."""
PAGE, FILES = 100, 2000
"""At most so many runs and other things, and so many files, are sent at once; clients ask for the rest."""
DEPTH = 20
LONGEST, LONGEST_ORDER = 20_000, 1000
"""Letters of a filter, and of an order."""
REGEX_S = 0.05
"""How long a pattern may search in one value; some would take for ever."""

FIELDS: dict[str, Callable[[ServedRun], Any]] = {
    "name": lambda run: run.key.name,
    "display_name": lambda run: run.facts.get("displayName") or run.key.name,
    "state": lambda run: run.state,
    "sweep": lambda run: run.sweep,
    "group": lambda run: run.facts.get("groupName"),
    "group_name": lambda run: run.facts.get("groupName"),
    "job_type": lambda run: run.facts.get("jobType"),
    "tags": lambda run: run.facts.get("tags") or [],
    "notes": lambda run: run.facts.get("notes"),
    "description": lambda run: run.facts.get("description"),
    "host": lambda run: run.facts.get("host"),
    "commit": lambda run: run.facts.get("commit"),
    "created_at": lambda run: run.created,
    "updated_at": lambda run: run.updated,
    "heartbeat_at": lambda run: run.updated,
}
TIMES = ("created_at", "updated_at", "heartbeat_at")
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
}
GROUPS = ("$and", "$or", "$nor")


@lru_cache(maxsize=1024)
def snake(name: str) -> str:
    """``created_at`` of ``createdAt``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def field_of(run: ServedRun, name: str, goal: str | None = None) -> Any:
    """A run's value by W&B's name for it: ``state``, ``config.orpo.beta.value``, ``summary_metrics.eval/loss``.

    ``goal``: which value of a metric counts where the summary has several, see ``number_at``.
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
    """``config.a`` and ``config.a.value``; of what is nested ``config.a.b``, ``config.a.b.value``, ``config.a.value.b``."""
    values = run.config_values()
    tries = ((values, name), (json.loads(run.config), name), (values, name.removesuffix(".value")))
    return next((found for content, path in tries if (found := value_at(content, path)) is not None), None)


def matches(field: Field, wanted: Any, depth: int = 0) -> bool:
    """Whether a thing with these fields fits a filter. Raises RequestError on what is not supported."""
    if not isinstance(wanted, Mapping) or depth > DEPTH:
        raise RequestError(f"a filter must be a mapping of names to conditions, nested at most {DEPTH} times.")
    for name, condition in wanted.items():
        if name in GROUPS:
            if not isinstance(condition, list):
                raise RequestError(f"{name} must have a list of filters.")
            found = [matches(field, part, depth + 1) for part in condition]
            good = all(found) if name == "$and" else any(found) == (name == "$or")
        else:
            good = _fits(name, field(name), condition, depth)
        if not good:
            return False
    return True


def _fits(name: str, value: Any, condition: Any, depth: int) -> bool:
    if snake(name) in TIMES:
        value, condition = math.floor(value), _in_seconds(name, condition)
    if not isinstance(condition, Mapping):
        return COMPARISONS["$eq"](value, condition)
    return all(_compares(name, value, condition, operator, depth) for operator in condition if operator != "$options")


def _compares(name: str, value: Any, condition: Mapping[str, Any], operator: str, depth: int) -> bool:
    wanted = condition[operator]
    if operator == "$not" and depth < DEPTH:
        return not _fits(name, value, wanted, depth + 1)
    if operator == "$regex":
        return _found(wanted, condition.get("$options", ""), value)
    if operator not in COMPARISONS:
        raise RequestError(
            f"filters cannot have '{operator[:80]}'. Valid: {', '.join(COMPARISONS)}, $regex, $not, {', '.join(GROUPS)}."
        )
    try:
        return COMPARISONS[operator](value, wanted)
    except TypeError:
        return False  # values of different kinds compare to nothing


def _found(pattern: Any, options: Any, value: Any) -> bool:
    """MongoDB's ``$regex``. Raises RequestError when it is not one, or takes too long."""
    flags = {"i": regex.IGNORECASE, "m": regex.MULTILINE, "s": regex.DOTALL, "x": regex.VERBOSE}
    if not isinstance(pattern, str) or len(pattern) > 500 or not isinstance(options, str) or set(options) - set(flags):
        raise RequestError("$regex must be a pattern of at most 500 letters, $options some of i, m, s and x.")
    values = value if isinstance(value, list) else [value]
    try:
        compiled = regex.compile(pattern, sum(flags[letter] for letter in set(options)))
        return any(compiled.search(text, timeout=REGEX_S) is not None for text in values if isinstance(text, str))
    except (regex.error, OverflowError, RecursionError) as error:
        raise RequestError(f"$regex must be a regular expression but got '{pattern[:80]}': {error}.") from error
    except TimeoutError as error:
        raise RequestError(f"$regex '{pattern[:80]}' takes too long. Choose a simpler one.") from error


def _in_seconds(name: str, condition: Any) -> Any:
    """Times of a condition in seconds. Raises RequestError on one that cannot be read: it would find nothing."""
    if isinstance(condition, Mapping):
        return {key: part if key == "$exists" else _in_seconds(name, part) for key, part in condition.items()}
    if isinstance(condition, list):
        return [_in_seconds(name, part) for part in condition]
    if condition is None or (isinstance(condition, (int, float)) and not isinstance(condition, bool)):
        return condition
    try:
        found = datetime.fromisoformat(condition)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(
            f"{name} must be compared with a time like 2026-11-27 or 2026-11-27T18:30:00Z but got {str(condition)[:80]!r}."
        ) from error


def read_filter(filters: str | None) -> Mapping[str, Any]:
    """A filter's conditions. Raises RequestError."""
    if filters and len(filters) > LONGEST:
        raise RequestError(f"filters may have at most {LONGEST} letters but got {len(filters)}.")
    try:
        wanted = json.loads(filters) if filters else {}
    except (ValueError, RecursionError) as error:
        raise RequestError(f"filters must be JSON: {error}") from error
    if not isinstance(wanted or {}, Mapping):
        raise RequestError("filters must be a mapping of names to conditions.")
    return wanted or {}


def select(runs: Sequence[ServedRun], filters: str | None, order: str | None) -> list[ServedRun]:
    """The runs that fit, in order. Raises RequestError when filters or order cannot be read."""
    wanted = read_filter(filters)
    if order and len(order) > LONGEST_ORDER:
        raise RequestError(f"order may have at most {LONGEST_ORDER} letters but got {len(order)}.")
    query_cost.spend(len(runs) * (1 + (filters or "").count(":")) // query_cost.LOOKS)
    found = [run for run in runs if matches(partial(field_of, run), wanted)]
    for part in reversed(_parts(order or "+created_at")):
        name = part.lstrip("+-")
        # those without a value come last, whatever the direction
        goal = "maximize" if part.startswith("-") else "minimize"
        values = {id(run): _sortable(field_of(run, name, goal), name.startswith("summary")) for run in found}
        there = [run for run in found if values[id(run)] is not None]
        there.sort(key=lambda run: values[id(run)], reverse=part.startswith("-"))  # type: ignore[arg-type, return-value]
        found = there + [run for run in found if values[id(run)] is None]
    return found


def _parts(order: str) -> list[str]:
    """What to sort by, one after another. A metric's name may have commas."""
    found: list[str] = []
    for part in re.split(r",(?=\s*[+-])", order):
        whole = part.strip().lstrip("+-").startswith(("summary", "config"))
        found += [part] if whole else part.split(",")
    return [part.strip() for part in found if part.strip()]


def _sortable(value: Any, metric: bool) -> tuple[int, Any] | None:
    """What to sort by; None for what has no place in an order: of metrics all but finite numbers ("NaN" is a string)."""
    if isinstance(value, str):
        return None if metric else (1, value)
    return (0, value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def page(
    found: Sequence[T], after: str | None, first: int | None, view: Callable[[T], Any], most: int = PAGE
) -> dict[str, Any]:
    """A GraphQL connection over part of ``found``; the cursor is a place in it."""
    if after and not after.isdecimal():
        raise RequestError(f"the cursor '{after[:40]}' is not one of this server's.")
    begin = int(after or 0)
    size = most if first is None else max(0, min(first, most))
    end = min(begin + size, len(found))
    edges = [{"node": view(one), "cursor": str(begin + i + 1)} for i, one in enumerate(found[begin:end])]
    more = end < len(found)
    info = {"endCursor": str(end) if edges else None, "hasNextPage": more}
    return {"edges": edges, "pageInfo": info, "totalCount": len(found)}
