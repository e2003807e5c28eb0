"""Reads a sweep's config: parses it, checks it, and converts it for agents and the pruner."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from isaerft_sweep.config.boundary import check_definition
from isaerft_sweep.config.compose import compose
from isaerft_sweep.errors import IsaerftError, SpaceError
from isaerft_sweep.search.pruning import evaluations
from isaerft_sweep.search.strict_yaml import parse_yaml
from isaerft_sweep.search.sweep_file import SweepDefinition, read_sweep
from isaerft_sweep.specs import Experiment
from isaerft_sweep.tracking.metric_names import is_number

PROGRAMS = ("isaerft_sweep.launch", "isaerft_sweep/launch.py", "isaerft-launch")
"""Names in a sweep file's command that start a trial of this package."""
EVALUATIONS = 1000
"""The number of evaluations of a run whose config does not say it."""


def parse_config(config: str) -> dict[str, Any]:
    """Parse the YAML of a sweep file. Raises SpaceError."""
    raw = parse_yaml(config)
    if not isinstance(raw, Mapping):
        raise SpaceError("a sweep's config must be a mapping with method, metric and parameters.")
    return dict(raw)


def read_definition(raw: Mapping[str, Any]) -> SweepDefinition:
    """Check the config: for this package's trials as ``launch`` does, else by W&B's rules. Raises SpaceError."""
    try:
        definition = read_sweep(raw, ours=is_ours(raw))
        return check_definition(definition, _experiment(_arguments(raw))) if is_ours(raw) else definition
    except SpaceError:
        raise
    except IsaerftError as error:
        raise SpaceError(str(error)) from error


def _arguments(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The overrides in the command of ``launch``, without macros such as ``${args}``, which only the agent can expand."""
    parts = [str(part) for part in raw.get("command") or ()]
    start = next((i for i, part in enumerate(parts) if part == "${program}" or any(name in part for name in PROGRAMS)), -1)
    return tuple(part for part in parts[start + 1 :] if start >= 0 and "${" not in part and not part.startswith("-"))


@lru_cache(maxsize=256)
def _experiment(arguments: tuple[str, ...]) -> Experiment:
    return compose(arguments)


def is_ours(raw: Mapping[str, Any]) -> bool:
    """Whether the sweep's command starts this package's trials."""
    command = raw.get("command")
    text = " ".join(map(str, command)) if isinstance(command, list) else str(command)
    return any(name in text for name in PROGRAMS) or "isaerft_sweep/launch.py" in str(raw.get("program", ""))


def nested(params: Mapping[str, Any], blocks: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nest flat values like the sweep file's ``parameters`` (``blocks``). ``prefix``: the dotted name of ``blocks``."""
    values: dict[str, Any] = {}
    for name, block in blocks.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        inner = block.get("parameters") if isinstance(block, Mapping) else None
        values[str(name)] = nested(params, inner, key) if inner else params[key]
    return values


def evaluations_of(config: Mapping[str, Any]) -> int:
    """The number of evaluations, after the one at step 0, of a run with this config."""
    orpo = config.get("orpo")
    if not isinstance(orpo, Mapping):
        return EVALUATIONS
    fraction, steps = orpo.get("eval_fraction"), orpo.get("max_steps")
    if not is_number(fraction) or not fraction or fraction <= 0:
        return EVALUATIONS
    return evaluations(fraction, steps if isinstance(steps, int) else -1)
