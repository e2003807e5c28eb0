"""Looks up metrics and parameters by dotted name in the JSON shapes that W&B's clients write.

``log({"val": {"acc": 1}})`` and ``log({"val.acc": 1})`` are both the metric ``val.acc``. In a summary,
``define_metric("acc", summary="max")`` gives ``{"acc": {"max": 1}}``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

AGGREGATES = ("best", "last", "mean", "max", "min", "first")
"""Aggregates of ``define_metric(summary=…)`` in any version of wandb."""
PLAIN = re.compile(r"[A-Za-z0-9_./ -]+", re.ASCII)


def value_at(content: Any, name: str, default: Any = None) -> Any:
    """The value of ``name`` in nested mappings whose keys may contain dots; the longest matching key wins."""
    if isinstance(content, Mapping) and name in content:
        return content[name]
    pending = [(content, name)]
    while pending:
        mapping, rest = pending.pop()
        if not isinstance(mapping, Mapping):
            continue
        if rest in mapping:
            return mapping[rest]
        dots = [index for index, letter in enumerate(rest) if letter == "."]
        pending += [(mapping[rest[:dot]], rest[dot + 1 :]) for dot in dots if rest[:dot] in mapping]
    return default


def number_at(content: Any, name: str, goal: str | None = None) -> float | None:
    """The finite number under ``name`` in a summary; of several aggregates ``best``, else the one that suits ``goal``."""
    value = value_at(content, name)
    if isinstance(value, Mapping):
        value = _aggregate(value, goal)
    return float(value) if is_number(value) else None


def _aggregate(aggregates: Mapping[str, Any], goal: str | None) -> Any:
    if "_type" in aggregates or not aggregates or not set(aggregates) <= set(AGGREGATES):
        return None  # an image, a histogram, or nested metrics
    by_goal = {"maximize": "max", "minimize": "min"}.get(goal or "", "last")
    return next((aggregates[name] for name in ("best", by_goal, *AGGREGATES) if name in aggregates), None)


def logged_value(row: Mapping[str, Any], name: str) -> Any:
    """A metric in a row of the history, None when it is missing. ``acc.max`` is logged as ``acc``."""
    value = value_at(row, name)
    base, _, last = name.rpartition(".")
    if value is None and base and last in AGGREGATES:
        value = value_at(row, base)
    return None if isinstance(value, Mapping) else value


def may_hold(text: str, name: str) -> bool:
    """Whether a row, as JSON text, can contain a metric: saves parsing most rows."""
    if not PLAIN.fullmatch(name):
        return True  # JSON may escape it
    *inner, last = name.split(".")
    return last in text or (bool(inner) and last in AGGREGATES and inner[-1] in text)


def flat(content: Mapping[str, Any], depth: int = 20) -> Iterator[tuple[str, Any]]:
    """The leaf values with their dotted names. Media, such as histograms, are one value; so is anything below ``depth``."""
    for name, value in content.items():
        if isinstance(value, Mapping) and value and "_type" not in value and depth:
            yield from ((f"{name}.{inner}", leaf) for inner, leaf in flat(value, depth - 1))
        else:
            yield name, value


def parameter_names(blocks: Mapping[str, Any], constants: bool = True, prefix: str = "") -> list[str]:
    """The dotted names in a sweep file's ``parameters``; without ``constants`` only those with several values."""
    names = []
    for name, block in blocks.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        inner = block if isinstance(block, Mapping) else {}
        if isinstance(inner.get("parameters"), Mapping):
            names += parameter_names(inner["parameters"], constants, key)
        elif constants or not _is_constant(inner):
            names.append(key)
    return names


def _is_constant(block: Mapping[str, Any]) -> bool:
    values = block.get("values")
    return "value" in block or (isinstance(values, list) and len(values) == 1)


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def as_json(value: Any) -> Any:
    """``value`` with non-finite numbers as W&B writes them: ``"NaN"``, ``"Infinity"``, ``"-Infinity"``."""
    if isinstance(value, Mapping):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list):
        return [as_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
