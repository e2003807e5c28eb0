"""What a sweep's config says: parsed, checked, and in the shapes that agents and pruner need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from isaerft_sweep.errors import IsaerftError, SpaceError
from isaerft_sweep.search.pruning import evaluations
from isaerft_sweep.search.sweep_file import SweepDefinition, read_sweep
from isaerft_sweep.tracking.metric_names import is_number

OURS = "isaerft_sweep.launch"
EVALUATIONS = 1000
"""How many evaluations a run has when its config does not tell."""


def parse_config(config: str) -> dict[str, Any]:
    """A sweep file's YAML. Raises SpaceError."""
    try:
        raw = yaml.safe_load(config)
    except yaml.YAMLError as error:
        raise SpaceError(f"the sweep's config must be YAML: {error}") from error
    except RecursionError as error:
        raise SpaceError("the sweep's config is nested too deeply.") from error
    if not isinstance(raw, Mapping):
        raise SpaceError("a sweep's config must be a mapping with method, metric and parameters.")
    return dict(raw)


def read_definition(raw: Mapping[str, Any]) -> SweepDefinition:
    """The checked config: strictly for our own trials, W&B's rules for other programs. Raises SpaceError."""
    try:
        return read_sweep(raw, ours=is_ours(raw))
    except SpaceError:
        raise
    except IsaerftError as error:
        raise SpaceError(str(error)) from error


def is_ours(raw: Mapping[str, Any]) -> bool:
    """Whether the sweep's command starts this package's trials."""
    command = raw.get("command")
    text = " ".join(map(str, command)) if isinstance(command, list) else str(command)
    return OURS in text or "isaerft-launch" in text or "isaerft_sweep/launch.py" in str(raw.get("program", ""))


def nested(params: Mapping[str, Any], blocks: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flat values in the shape of the sweep file's ``parameters``."""
    found: dict[str, Any] = {}
    for name, block in blocks.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        inner = block.get("parameters") if isinstance(block, Mapping) else None
        found[str(name)] = nested(params, inner, key) if inner else params[key]
    return found


def evaluations_of(config: Mapping[str, Any]) -> int:
    """How often a run with this config is evaluated after its first step."""
    orpo = config.get("orpo")
    if not isinstance(orpo, Mapping):
        return EVALUATIONS
    fraction, steps = orpo.get("eval_fraction"), orpo.get("max_steps")
    if not is_number(fraction) or not fraction or fraction <= 0:
        return EVALUATIONS
    return evaluations(fraction, steps if isinstance(steps, int) else -1)
