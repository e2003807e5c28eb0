"""What a sweep's config says: parsed, checked, and in the shapes that agents and pruner need."""

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
"""What starts a trial of this package, in a sweep file's command."""
EVALUATIONS = 1000
"""How many evaluations a run has when its config does not tell."""


def parse_config(config: str) -> dict[str, Any]:
    """A sweep file's YAML. Raises SpaceError."""
    raw = parse_yaml(config)
    if not isinstance(raw, Mapping):
        raise SpaceError("a sweep's config must be a mapping with method, metric and parameters.")
    return dict(raw)


def read_definition(raw: Mapping[str, Any]) -> SweepDefinition:
    """The checked config: for our own trials as ``launch`` reads it, W&B's rules for other programs. Raises SpaceError."""
    try:
        definition = read_sweep(raw, ours=is_ours(raw))
        return check_definition(definition, _experiment(_arguments(raw))) if is_ours(raw) else definition
    except SpaceError:
        raise
    except IsaerftError as error:
        raise SpaceError(str(error)) from error


def _arguments(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """What the command gives to ``launch`` beside the sampled values: what an agent's machine fills in is not known here."""
    words = [str(word) for word in raw.get("command") or ()]
    place = next((i for i, word in enumerate(words) if word == "${program}" or any(name in word for name in PROGRAMS)), -1)
    return tuple(word for word in words[place + 1 :] if place >= 0 and "${" not in word and not word.startswith("-"))


@lru_cache(maxsize=256)
def _experiment(arguments: tuple[str, ...]) -> Experiment:
    return compose(arguments)


def is_ours(raw: Mapping[str, Any]) -> bool:
    """Whether the sweep's command starts this package's trials."""
    command = raw.get("command")
    text = " ".join(map(str, command)) if isinstance(command, list) else str(command)
    return any(name in text for name in PROGRAMS) or "isaerft_sweep/launch.py" in str(raw.get("program", ""))


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
