"""Converts plain data to frozen dataclasses, checking names, types and bounds, and back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any, TypedDict, Unpack

from isaerft_sweep.errors import ConfigError, suggest

PLAIN_WORD = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
NOT_WORDS = ("null", "true", "false", "inf", "nan")
"""Words that Hydra does not parse as strings."""


class Rules(TypedDict, total=False):
    """Metadata of an option beside its type and help.

    ``affects_result=False``: it cannot change a trial's result, and is not part of the trial's hash.
    ``omit_from_hash_if_default``: it is newer than existing hashes, and is not part of them while it has its default.
    ``formerly``: its name in earlier versions, still accepted.
    """

    choices: tuple[str, ...]
    above: float
    at_least: float
    at_most: float
    affects_result: bool
    omit_from_hash_if_default: bool
    formerly: str


def option(help: str, default: Any = dataclasses.MISSING, **rules: Unpack[Rules]) -> Any:
    """A field of a spec with its help text, its default and its rules."""
    return field(default=default, metadata={"help": help, **rules})


def with_present_names(cls: type, raw: Mapping[str, Any]) -> dict[str, Any]:
    """``raw`` with former names of options replaced by the current ones."""
    names = {f.metadata["formerly"]: f.name for f in dataclasses.fields(cls) if "formerly" in f.metadata}
    return {names.get(key, key) if names.get(key, key) not in raw else key: value for key, value in raw.items()}


def to_dict(spec: Any) -> Any:
    """A spec as plain dicts, lists and scalars, ready for JSON."""
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        return {f.name: to_dict(getattr(spec, f.name)) for f in dataclasses.fields(spec)}
    if isinstance(spec, Mapping):
        return {k: to_dict(v) for k, v in spec.items()}
    return [to_dict(v) for v in spec] if isinstance(spec, (tuple, list)) else spec


def from_mapping(cls: type, raw: Mapping[str, Any], where: str) -> Any:
    """The frozen dataclass ``cls`` from plain data. ``where``: its dotted key. Raises ConfigError that names a wrong key."""
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    raw = with_present_names(cls, raw)
    for key in raw:
        if key not in names:
            raise ConfigError(f"unknown config key '{_join(where, str(key))}'." + suggest(str(key), names))
    values: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        key = _join(where, f.name)
        if f.name not in raw:
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{key} must be set. Give it on the command line: {key}=VALUE.")
            continue
        values[f.name] = _check_bounds(key, _convert(hints[f.name], raw[f.name], key), f.metadata)
    return cls(**values)


def _convert(hint: Any, value: Any, key: str) -> Any:
    """``value`` as the annotated type ``hint``. Converts ints to floats, and floats to ints if they are whole."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, key)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} must be a mapping but got {value!r}.")
        return from_mapping(typing.cast(type, hint), value, key)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key} must be a list but got {value!r}.")
        return tuple(_convert(args[0], v, f"{key}[{i}]") for i, v in enumerate(value))
    if hint is Any or origin is not None:
        return dict(value) if isinstance(value, Mapping) else value
    return _convert_scalar(hint, value, key)


def _convert_scalar(hint: type, value: Any, key: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ConfigError(f"{key} must be of type {hint.__name__} but got {value!r} ({type(value).__name__}).")


def _check_bounds(key: str, value: Any, meta: Mapping[str, Any]) -> Any:
    choices = meta.get("choices")
    if value is None or isinstance(value, (bool, tuple, dict)) or not meta:
        return value
    if choices and value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(choices)} but got {value!r}.")
    if isinstance(value, (int, float)):
        if not math.isfinite(value):
            raise ConfigError(f"{key} must be finite but got {value}.")
        above, at_least, at_most = (meta.get(name) for name in ("above", "at_least", "at_most"))
        for relation, bound, violated in (
            ("above", above, above is not None and value <= above),
            ("at least", at_least, at_least is not None and value < at_least),
            ("at most", at_most, at_most is not None and value > at_most),
        ):
            if violated:
                raise ConfigError(f"{key} must be {relation} {bound} but got {value}.")
    return value


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def canonical_json(content: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, floats in their shortest exact form."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def overrides(params: Mapping[str, Any]) -> list[str]:
    """Sampled values as Hydra overrides, floats exact: ``["orpo.beta=0.2", "adapter.top_k=null"]``."""
    return [f"{key}={_to_hydra(value)}" for key, value in params.items()]


def _to_hydra(value: Any) -> str:
    """A value in the grammar of Hydra's overrides, which is similar to YAML's flow style."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_to_hydra(v)}" for key, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_to_hydra, value)) + "]"
    if not isinstance(value, str) or (PLAIN_WORD.fullmatch(value) and value.lower() not in NOT_WORDS):
        return str(value) if isinstance(value, str) else repr(value)
    # only backslashes before a quote are escapes; ${ would start an interpolation
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value.replace("${", "\\${"))
    return f"'{escaped}'"
