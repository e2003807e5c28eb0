"""Composing the config outside of Hydra's own main, for commands that take the same overrides as ``launch``."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from isaerft_sweep.config.boundary import to_experiment
from isaerft_sweep.config.composition_errors import explain
from isaerft_sweep.config.schema import register
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.paths import folder
from isaerft_sweep.spec_fields import overrides
from isaerft_sweep.specs import Experiment, split_key

VERSION = "wandb_version"
PREFIXES = ("", "--", "+", "++")
"""What W&B's macros put before ``key=value``."""


def agent_values(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The values of the trial that ``wandb agent`` asks for, by dotted key; None when no agent's file is named.

    Raises LaunchError when the file cannot be read: without it nobody knows what the agent has asked for.
    """
    raw = _agent_file(environment)
    return None if raw is None else _dotted(raw)


def _agent_file(environment: Mapping[str, str]) -> dict[str, Any] | None:
    path = environment.get("WANDB_SWEEP_PARAM_PATH")
    if not path:
        return None
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return {key: entry["value"] for key, entry in content.items() if key != VERSION}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise LaunchError(
            "WANDB_SWEEP_PARAM_PATH must name the file in which wandb agent has written the trial's values, but "
            f"'{path}' cannot be read ({type(error).__name__}: {error}). Without an agent: unset WANDB_SWEEP_ID "
            "and WANDB_SWEEP_PARAM_PATH."
        ) from error


def _dotted(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flat keys of what a nested ``parameters`` block arrives as."""
    flat: dict[str, Any] = {}
    for name, value in raw.items():
        key = f"{prefix}{name}"
        flat |= _dotted(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def from_agent(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The command line of a trial that ``wandb agent`` has started: the agent's file decides every swept value.

    Whatever macro of W&B the sweep file's ``command`` has (``${args}``, ``${args_no_hyphens}``, ``${args_json_file}``, …, or
    none), what it put there is taken out and the file's values are given in Hydra's words, last, so that nothing before them
    can change one. Raises LaunchError when the file cannot be read, ConfigError when a key is not one of the config's.
    """
    raw = _agent_file(environment)
    if raw is None:
        return list(arguments)
    values = _dotted(raw)
    for key in values:
        split_key(key)
    return [*_without_macros(arguments, raw), *overrides(values)]


def _without_macros(arguments: Sequence[str], raw: Mapping[str, Any]) -> list[str]:
    """``arguments`` without what W&B's macros made of the values ``raw``: see ``create_sweep_command_args`` in wandb."""
    words = {f"{prefix}{key}={value}" for key, value in raw.items() for prefix in PREFIXES}
    words |= {f"--{key}" for key, value in raw.items() if value is True}  # ${args_no_boolean_flags}
    words |= set(raw)  # ${args_dict}; an override always has a sign
    pairs = {(f"--{key}", str(value)) for key, value in raw.items()}  # ${args_no_equals}
    kept: list[str] = []
    rest = list(arguments)
    while rest:
        if tuple(rest[:2]) in pairs:
            del rest[:2]
            continue
        word = rest.pop(0)
        if word not in words and not _is_json_of(word, raw):
            kept.append(word)
    return kept


def _is_json_of(word: str, raw: Mapping[str, Any]) -> bool:
    """Whether ``word`` holds the values as JSON (``${args_json}``), or names a file that does (``${args_json_file}``)."""
    try:
        text = word if word.startswith("{") else Path(word).read_text(encoding="utf-8") if word.endswith(".json") else ""
        return bool(text) and json.loads(text) == raw
    except (OSError, ValueError):
        return False


def with_present_names(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with config keys of earlier versions under their present names; each is said once."""
    read = []
    for argument in arguments:
        marks, key, value = re.match(r"([+~]*)([^=]*)(.*)", argument, re.DOTALL).groups()  # type: ignore[union-attr]
        present = _renamed_keys().get(key)
        if present:
            print(f"note: {key} is now {present}; the old name still works.", file=sys.stderr)
        read.append(f"{marks}{present or key}{value}")
    return read


@lru_cache(maxsize=1)
def _renamed_keys() -> dict[str, str]:
    """Present config key by its former name."""
    sections = {f.name: typing.get_type_hints(Experiment)[f.name] for f in dataclasses.fields(Experiment)}
    return {
        f"{section}.{f.metadata['formerly']}": f"{section}.{f.name}"
        for section, spec in sections.items()
        if dataclasses.is_dataclass(spec)
        for f in dataclasses.fields(spec)
        if "formerly" in f.metadata
    }


def compose(overrides: Sequence[str]) -> Experiment:
    """The experiment that ``overrides`` describe. Raises ConfigError when they do not."""
    register()
    try:
        with hydra.initialize_config_dir(str(folder("conf")), version_base="1.3"):
            return to_experiment(hydra.compose("config", with_present_names(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
