"""Explains Hydra's and OmegaConf's errors about overrides in one line: the key, its value and the valid ones."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from isaerft_sweep.errors import ConfigError, suggest
from isaerft_sweep.paths import folder
from isaerft_sweep.specs import Experiment, HookPoint

_UNKNOWN_KEY = re.compile(r"Could not (?:override|delete) '([^']*)'")
_UNKNOWN_CHOICE = re.compile(r"Could not find '([^'/]+)/([^']+)'")
_NOT_A_CHOICE = re.compile(r"Config group override must be a string")
_ALREADY_THERE = re.compile(r"An item is already at '([^']+)'")
_REMOVED = re.compile(r"Error merging override ~([^\s=]+)")
_BAD_VALUE = re.compile(r"Error merging override (\S+?)=(.*)")
_SEVERAL = re.compile(r"Ambiguous value for argument '([^=]+)=(.*)'")
QUOTES = "A value with spaces, commas, brackets or quotes needs its own quotes: \"data.path='a, b.jsonl'\"."


def explain(error: Exception) -> ConfigError:
    """Hydra's or OmegaConf's ``error`` as a ConfigError that tells what is wrong on the command line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = "\n".join(lines)
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"'{error.override}' must have the form KEY=VALUE, such as orpo.beta=0.2, but cannot be read ({lines[0]}). "
            f"{QUOTES}"
        )
    if match := _UNKNOWN_KEY.search(text):
        return ConfigError(f"'{match[1]}' is not a config key." + _nearest(match[1]))
    if match := _UNKNOWN_CHOICE.search(text):
        return ConfigError(f"there is no {match[1]} '{match[2]}'." + suggest(match[2], _choices(match[1])))
    if _NOT_A_CHOICE.search(text):
        return ConfigError(
            "a config group must be set to the name of one of its files, such as orpo=quick, but an override sets one to a "
            f"number or null, or has nothing before its =. Groups: {', '.join(sorted(_groups()))}."
        )
    if match := _ALREADY_THERE.search(text):
        return ConfigError(f"'{match[1]}' is a config key already: leave the + out, {match[1]}=VALUE.")
    if match := _REMOVED.search(text):
        return ConfigError(f"{match[1]} cannot be removed: every config has it. Set it: {match[1]}=VALUE.")
    if match := _BAD_VALUE.search(text):
        reasons = str(error.__cause__ or "").splitlines()
        return ConfigError(f"{match[1]} cannot be {match[2]}: {reasons[0] if reasons else 'it is of another type'}.")
    if match := _SEVERAL.search(text):
        return ConfigError(
            f"{match[1]} must have one value but got {match[2]}. A list is {match[1]}=[{match[2]}], a text with a comma "
            f"\"{match[1]}='{match[2]}'\"; --multirun runs one sweep for each value."
        )
    return ConfigError(" ".join(lines[:2]) or type(error).__name__)


def _nearest(key: str) -> str:
    """A hint with the valid keys: those of ``key``'s section, or the sections."""
    section, dot, rest = key.lstrip("+~").partition(".")
    name, _, inner = rest.partition(".")
    if name == "sites" and inner:
        option = inner.rpartition(".")[2]
        return suggest(option, [f.name for f in dataclasses.fields(HookPoint)])
    if (section, name) == ("launcher", "slurm"):
        flags = OmegaConf.load(folder("conf") / "launcher" / "slurm.yaml").slurm
        return suggest(inner, map(str, flags)) + f" Another flag of sbatch's takes a +: +{key}=VALUE (with launcher=slurm)."
    in_section = [valid for valid in _keys(Experiment) if valid.startswith(f"{section}.")]
    return suggest(key, in_section if dot and in_section else sorted({*_keys(Experiment, deep=False), *_groups()}))


def _keys(spec: Any, prefix: str = "", deep: bool = True) -> Iterator[str]:
    hints = typing.get_type_hints(spec)
    for f in dataclasses.fields(spec):
        if deep and dataclasses.is_dataclass(hints[f.name]):
            yield from _keys(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}"


def _groups() -> list[str]:
    return [path.name for path in folder("conf").iterdir() if path.is_dir()] + ["sweep"]


def _choices(group: str) -> Iterable[str]:
    if group == "sweep":
        return ["none", *(path.stem for path in folder("sweeps").glob("*.yaml"))]
    return [path.stem for path in (folder("conf") / group).glob("*.yaml")]
