"""Composes the config outside ``hydra.main``, for commands that take the same overrides as ``launch``."""

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
"""Prefixes that W&B's macros add to ``key=value``."""


def agent_values(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The values of the agent's trial by dotted key, from the file that it names; None when it names none.

    Raises LaunchError when the file cannot be read: the values would be unknown.
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
    """Dotted keys of a nested mapping, as which a nested ``parameters`` block arrives."""
    flat: dict[str, Any] = {}
    for name, value in raw.items():
        key = f"{prefix}{name}"
        flat |= _dotted(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def from_agent(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The overrides of a trial that ``wandb agent`` has started: every swept value comes from the agent's file.

    Drops what a W&B macro in the sweep file's ``command`` has added (``${args}``, ``${args_no_hyphens}``,
    ``${args_json_file}``, …), and appends the file's values as Hydra overrides; the last override of a key wins. Raises
    LaunchError when the file cannot be read, ConfigError when a key is not a config key.
    """
    raw = _agent_file(environment)
    if raw is None:
        return list(arguments)
    values = _dotted(raw)
    for key in values:
        split_key(key)
    return [*_without_macros(arguments, raw), *overrides(values)]


def _without_macros(arguments: Sequence[str], raw: Mapping[str, Any]) -> list[str]:
    """``arguments`` without those that W&B's macros make of ``raw``: see ``create_sweep_command_args`` in wandb."""
    from_macros = {f"{prefix}{key}={value}" for key, value in raw.items() for prefix in PREFIXES}
    from_macros |= {f"--{key}" for key, value in raw.items() if value is True}  # ${args_no_boolean_flags}
    from_macros |= set(raw)  # ${args_dict}; an override always has an equals sign
    pairs = {(f"--{key}", str(value)) for key, value in raw.items()}  # ${args_no_equals}
    kept: list[str] = []
    rest = list(arguments)
    while rest:
        if tuple(rest[:2]) in pairs:
            del rest[:2]
            continue
        argument = rest.pop(0)
        if argument not in from_macros and not _is_json_of(argument, raw):
            kept.append(argument)
    return kept


def _is_json_of(arg: str, raw: Mapping[str, Any]) -> bool:
    """Whether ``arg`` holds the values as JSON (``${args_json}``), or names a file that does (``${args_json_file}``)."""
    try:
        text = arg if arg.startswith("{") else Path(arg).read_text(encoding="utf-8") if arg.endswith(".json") else ""
        return bool(text) and json.loads(text) == raw
    except (OSError, ValueError):
        return False


def with_present_names(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with config keys of earlier versions renamed to the current ones, with a note for each."""
    renamed = []
    for argument in arguments:
        marks, key, value = re.match(r"([+~]*)([^=]*)(.*)", argument, re.DOTALL).groups()  # type: ignore[union-attr]
        current = _renamed_keys().get(key)
        if current:
            print(f"note: {key} is now {current}; the old name still works.", file=sys.stderr)
        renamed.append(f"{marks}{current or key}{value}")
    return renamed


@lru_cache(maxsize=1)
def _renamed_keys() -> dict[str, str]:
    """Current config keys by their former names."""
    sections = {f.name: typing.get_type_hints(Experiment)[f.name] for f in dataclasses.fields(Experiment)}
    return {
        f"{section}.{f.metadata['formerly']}": f"{section}.{f.name}"
        for section, spec in sections.items()
        if dataclasses.is_dataclass(spec)
        for f in dataclasses.fields(spec)
        if "formerly" in f.metadata
    }


def compose(overrides: Sequence[str]) -> Experiment:
    """The experiment that ``overrides`` describe. Raises ConfigError when they are not valid."""
    register()
    try:
        with hydra.initialize_config_dir(str(folder("conf")), version_base="1.3"):
            config = hydra.compose("config", with_present_names(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explain(error) from error
    return to_experiment(config)
