"""Metrics and parameters by their dotted names, in the shapes in which W&B's clients write them.

``log({"val": {"acc": 1}})`` and ``log({"val.acc": 1})`` are both the metric ``val.acc``; in a summary, what
``define_metric("acc", summary="max")`` asks for stands there as ``{"acc": {"max": 1}}``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

AGGREGATES = ("best", "last", "mean", "max", "min", "first")
"""What ``define_metric(summary=…)`` may ask for, in every version of wandb."""
PLAIN = re.compile(r"[A-Za-z0-9_./ -]+", re.ASCII)


def value_at(content: Any, name: str, default: Any = None) -> Any:
    """What ``name`` means in nested mappings whose own keys may hold dots; the longest key that fits goes first."""
    if isinstance(content, Mapping) and name in content:
        return content[name]
    waiting = [(content, name)]
    while waiting:
        inside, rest = waiting.pop()
        if not isinstance(inside, Mapping):
            continue
        if rest in inside:
            return inside[rest]
        dots = [place for place, letter in enumerate(rest) if letter == "."]
        waiting += [(inside[rest[:dot]], rest[dot + 1 :]) for dot in dots if rest[:dot] in inside]
    return default


def number_at(content: Any, name: str, goal: str | None = None) -> float | None:
    """The finite number that ``name`` means in a summary; of several aggregates the best one, else the one of ``goal``."""
    found = value_at(content, name)
    if isinstance(found, Mapping):
        found = _aggregate(found, goal)
    return float(found) if is_number(found) else None


def _aggregate(found: Mapping[str, Any], goal: str | None) -> Any:
    if "_type" in found or not found or not set(found) <= set(AGGREGATES):
        return None  # an image, a histogram, or metrics of their own
    wanted = {"maximize": "max", "minimize": "min"}.get(goal or "", "last")
    return next((found[name] for name in ("best", wanted, *AGGREGATES) if name in found), None)


def logged_value(row: Mapping[str, Any], name: str) -> Any:
    """A metric in a row of the history, None when it is not there. ``acc.max`` is logged as ``acc``."""
    found = value_at(row, name)
    base, _, last = name.rpartition(".")
    if found is None and base and last in AGGREGATES:
        found = value_at(row, base)
    return None if isinstance(found, Mapping) else found


def may_hold(text: str, name: str) -> bool:
    """Whether a row, as JSON, can hold a metric: most rows need not be read for it."""
    if not PLAIN.fullmatch(name):
        return True  # JSON may write it in another way
    *inner, last = name.split(".")
    return last in text or (bool(inner) and last in AGGREGATES and inner[-1] in text)


def flat(content: Mapping[str, Any], depth: int = 20) -> Iterator[tuple[str, Any]]:
    """The single values by their dotted names. Media, such as histograms, are one value; so is what lies very deep."""
    for name, value in content.items():
        if isinstance(value, Mapping) and value and "_type" not in value and depth:
            yield from ((f"{name}.{inner}", part) for inner, part in flat(value, depth - 1))
        else:
            yield name, value


def parameter_names(blocks: Mapping[str, Any], constants: bool = True, prefix: str = "") -> list[str]:
    """The dotted names in a sweep file's ``parameters``, with or without those that have one value."""
    found = []
    for name, block in blocks.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        inner = block if isinstance(block, Mapping) else {}
        if isinstance(inner.get("parameters"), Mapping):
            found += parameter_names(inner["parameters"], constants, key)
        elif constants or not _is_constant(inner):
            found.append(key)
    return found


def _is_constant(block: Mapping[str, Any]) -> bool:
    values = block.get("values")
    return "value" in block or (isinstance(values, list) and len(values) == 1)


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def as_json(value: Any) -> Any:
    """``value`` with what JSON lacks as W&B writes it: ``"NaN"``, ``"Infinity"``, ``"-Infinity"``."""
    if isinstance(value, Mapping):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list):
        return [as_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
