"""The structured config: mutable twins of the specs, against which Hydra checks names and types."""

from __future__ import annotations

import dataclasses
import types
import typing
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from isaerft_sweep.paths import folder
from isaerft_sweep.specs import Experiment


def register() -> None:
    """Register the schema with Hydra, and one ``sweep`` choice per file in ``sweeps/`` besides ``none``."""
    OmegaConf.register_new_resolver("only_for", only_for, replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=mutable_twin(Experiment))
    store.store(group="sweep", name="none", node={"name": "none"})
    for file in sweep_files():
        store.store(group="sweep", name=file.stem, node={"name": file.stem, "file": str(file)})


def only_for(config_name: str, name: str, value: str) -> str | None:
    """``${only_for:${.name},NAME,VALUE}``: ``value`` if the config's name is NAME, with or without its owner, else null."""
    return value if config_name.rstrip("/").rpartition("/")[2].lower() == name.rpartition("/")[2].lower() else None


def sweep_files() -> list[Path]:
    """The sweep files that ship with the package."""
    return sorted(folder("sweeps").glob("*.yaml"))


@lru_cache
def mutable_twin(spec: Any) -> type:
    """A mutable dataclass with the fields of the frozen ``spec``: OmegaConf makes frozen ones read-only.

    One for each spec: `--cfg job --resolve` compares the types of model.sites and adapter.sites.
    """
    hints = typing.get_type_hints(spec)
    fields = []
    for f in dataclasses.fields(spec):
        hint = _mutable_hint(hints[f.name])
        fields.append((f.name, hint, _default(f, hint)))
    return dataclasses.make_dataclass(spec.__name__.replace("Spec", "Config"), fields)


def _mutable_hint(hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return mutable_twin(cast(type, hint))
    if origin is tuple:
        return list[_mutable_hint(args[0])]  # type: ignore[misc]
    if origin in (typing.Union, types.UnionType):
        return typing.Optional[_mutable_hint(next(a for a in args if a is not type(None)))]  # noqa: UP045
    return dict[str, Any] if origin is not None else hint


def _default(f: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return dataclasses.field(default_factory=typing.cast(Any, hint))
    if f.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=f.default_factory)
    if isinstance(f.default, tuple):
        return dataclasses.field(default_factory=list)
    return dataclasses.field(default=MISSING if f.default is dataclasses.MISSING else f.default)
