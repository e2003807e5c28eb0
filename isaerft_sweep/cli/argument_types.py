"""Parsers of option values for argparse, and options that several commands have."""

from __future__ import annotations

import argparse
import math
from pathlib import Path


def at_least_one(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1 but got '{text}'")
    return int(text)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0 but got '{text}'")
    return value


def strength(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0 but got '{text}'")
    return value


def strengths(text: str) -> list[float]:
    """Several strengths, with commas between them."""
    return [strength(part) for part in text.split(",")]


def weight(text: str) -> tuple[str, float]:
    """``METRIC=WEIGHT``, with a weight of at least 0."""
    name, equals, value = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be METRIC=WEIGHT but got '{text}'")
    return name, strength(value)


def whole_number(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0 but got '{text}'")
    return int(text)


def labels(text: str) -> tuple[int | None, Path]:
    """A file of labels: ``LAYER=PATH``, or ``PATH`` for every layer."""
    layer, equals, path = text.partition("=")
    return (int(layer), Path(path)) if equals and layer.isdecimal() else (None, Path(text))


def add_metric_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--metric``."""
    parser.add_argument("--metric", help="rank by this metric instead of the sweep's own (eval/log_odds_chosen, ...)")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--prompt`` and ``--max-new-tokens``."""
    parser.add_argument("--prompt", action="append", help="a prompt to answer; repeatable")
    parser.add_argument("--max-new-tokens", type=at_least_one, default=60, help="longest answer, in tokens")
