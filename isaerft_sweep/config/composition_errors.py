"""What Hydra and OmegaConf say of a bad override, in one line with the key, the value and what is valid."""

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

_UNKNOWN_KEY = re.compile(r"Could not override '([^']+)'")
_UNKNOWN_CHOICE = re.compile(r"Could not find '([^'/]+)/([^']+)'")
_ALREADY_THERE = re.compile(r"An item is already at '([^']+)'")
_BAD_VALUE = re.compile(r"Error merging override (\S+?)=(.*)")
_SEVERAL = re.compile(r"Ambiguous value for argument '([^=]+)=(.*)'")
QUOTES = "A value with spaces, commas, brackets or quotes goes into quotes of its own: \"data.path='a, b.jsonl'\"."


def explain(error: Exception) -> ConfigError:
    """The ConfigError that says what Hydra's or OmegaConf's ``error`` means for the command line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = "\n".join(lines)
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"'{error.override}' must have the form KEY=VALUE, such as orpo.beta=0.2, but cannot be read ({lines[0]}). "
            f"{QUOTES}"
        )
    if found := _UNKNOWN_KEY.search(text):
        return ConfigError(f"'{found[1]}' is not a config key." + _nearest(found[1]))
    if found := _UNKNOWN_CHOICE.search(text):
        return ConfigError(f"there is no {found[1]} '{found[2]}'." + suggest(found[2], _choices(found[1])))
    if found := _ALREADY_THERE.search(text):
        return ConfigError(f"'{found[1]}' is a config key already: leave the + out, {found[1]}=VALUE.")
    if found := _BAD_VALUE.search(text):
        why = str(error.__cause__ or "").splitlines()
        return ConfigError(f"{found[1]} cannot be {found[2]}: {why[0] if why else 'it is of another type'}.")
    if found := _SEVERAL.search(text):
        return ConfigError(
            f"{found[1]} must have one value but got {found[2]}. A list is {found[1]}=[{found[2]}], a text with a comma "
            f"\"{found[1]}='{found[2]}'\"; --multirun runs one sweep for each value."
        )
    return ConfigError(" ".join(lines[:2]) or type(error).__name__)


def _nearest(key: str) -> str:
    """The config keys that ``key`` may have meant: those of its section, or the sections."""
    section, dot, rest = key.lstrip("+~").partition(".")
    name, _, inner = rest.partition(".")
    if name == "sites" and inner:
        option = inner.rpartition(".")[2]
        return suggest(option, [f.name for f in dataclasses.fields(HookPoint)])
    if (section, name) == ("launcher", "slurm"):
        flags = OmegaConf.load(folder("conf") / "launcher" / "slurm.yaml").slurm
        return suggest(inner, map(str, flags)) + f" Another flag of sbatch's takes a +: +{key}=VALUE (with launcher=slurm)."
    inside = [known for known in _keys(Experiment) if known.startswith(f"{section}.")]
    return suggest(key, inside if dot and inside else sorted({*_keys(Experiment, deep=False), *_groups()}))


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
