"""Frozen, checked descriptions of a model, data set, adapter, loss, trial and sweep; plain data, no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isaerft_sweep.errors import ConfigError, suggest
from isaerft_sweep.plain import canonical_json, from_mapping, option, to_dict


@dataclass(frozen=True)
class Site:
    """One residual-stream site: the output of decoder layer ``layer``, read and written through one frozen SAE."""

    layer: int = option(at_least=0)
    sae_release: str | None = option(None)
    sae_id: str | None = option(None)
    sae_path: str | None = option(None)

    def with_absolute_path(self) -> Site:
        return dataclasses.replace(self, sae_path=absolute(self.sae_path))


@dataclass(frozen=True)
class ModelSpec:
    """A frozen decoder-only language model.

    ``source``: ``hub`` (name is a Hub id or a local folder), ``package`` (weights shipped by an installed Python
    package) or ``random`` (a tiny model with random weights, made on the spot, for tests).
    """

    name: str = option()
    tokenizer: str | None = option(None)
    source: str = option("hub", choices=("hub", "package", "random"))
    architecture: str | None = option(None)
    revision: str | None = option(None)
    dtype: str = option("auto", choices=("auto", "float32", "bfloat16", "float16"))
    attention: str | None = option(None, choices=("eager", "sdpa", "flash_attention_2"))
    license: str | None = option(None, cosmetic=True)
    sites: tuple[Site, ...] = option(())

    @property
    def short_name(self) -> str:
        """The name without its owner or folder: ``gemma-2-2b`` of ``google/gemma-2-2b``."""
        return self.name.rstrip("/").split("/")[-1]


@dataclass(frozen=True)
class DataSpec:
    """Preference pairs. Slices (``train[:1000]``) select rows of a Hub data set's split; sizes select pairs of a file."""

    name: str = option()
    source: str = option("hub", choices=("hub", "files", "builtin"))
    path: str | None = option(None)
    eval_path: str | None = option(None)
    train_split: str = option("train")
    eval_split: str = option("test")
    train_size: int | None = option(None, at_least=1)
    eval_size: int | None = option(None, at_least=1)
    seed: int = option(0, at_least=0)
    license: str | None = option(None, cosmetic=True)


@dataclass(frozen=True)
class AdapterSpec:
    """The trainable block on the SAE's latents f. bias: f + b; scale: f·(1 + s); linear: f + Wf + c; mlp: f + MLP(f).

    ``l1`` and ``top_k`` keep few latents, for bias and scale: see ``trial/sparsity.py``. ``force_hook`` takes an SAE whose
    own config names another place or model than its site.
    """

    kind: str = option("bias", choices=("bias", "scale", "linear", "mlp"))
    sites: tuple[Site, ...] = option(())
    rank: int | None = option(None, at_least=1)
    hidden_size: int | None = option(None, at_least=1)
    hidden_layers: int = option(1, at_least=1)
    l1: float | None = option(None, at_least=0, later=True)
    top_k: int | None = option(None, at_least=1, later=True)
    force_hook: bool = option(False, cosmetic=True)


@dataclass(frozen=True)
class OrpoSpec:
    """ORPO (arXiv 2403.07691) and its optimiser. ``beta`` is the paper's λ, the weight of the odds-ratio term.

    ``eval_untrained``: evaluate before the first step in the sweep's first trial (what it finds holds for all), in every
    trial, or never.
    """

    learning_rate: float = option(above=0)
    beta: float = option(at_least=0)
    epochs: float = option(1.0, above=0)
    max_steps: int = option(-1, at_least=-1)
    max_length: int = option(1024, at_least=2)
    batch_size: int = option(2, at_least=1)
    eval_batch_size: int = option(8, at_least=1)
    gradient_accumulation: int = option(8, at_least=1)
    warmup_steps: int = option(10, at_least=0)
    schedule: str = option("linear", choices=("linear", "cosine", "constant", "constant_with_warmup"))
    optimizer: str = option("auto")
    weight_decay: float = option(0.0, at_least=0)
    max_grad_norm: float = option(1.0, at_least=0)
    seed: int = option(42, at_least=0)
    eval_fraction: float = option(0.2, above=0, at_most=1)
    eval_untrained: str = option("first", choices=("first", "always", "never"), cosmetic=True)
    checkpoint_every_steps: int = option(50, at_least=1, cosmetic=True)
    checkpoint_every_min: float = option(5.0, above=0, cosmetic=True)
    gradient_checkpointing: bool = option(False)
    diverged_loss_factor: float = option(10.0, above=1, cosmetic=True)


@dataclass(frozen=True)
class TrackerSpec:
    """Where a trial's W&B run goes. ``offline`` writes runs that ``wandb sync`` can attach to their sweep later."""

    mode: str = option("offline", choices=("wandb", "offline", "disabled"))
    project: str = option("orpo-isaerft-sweep")
    entity: str | None = option(None)
    tags: tuple[str, ...] = option(())


@dataclass(frozen=True)
class LauncherSpec:
    """Where and how many at a time trials run. ``slots`` None: ``trials_per_gpu`` per visible GPU (local), 1 without a GPU.

    ``resident``: a worker runs one trial after the other, with one start; without it every trial has its own process.
    ``packed``: how many trials a resident worker takes through the model together; None: as many as pay, measured there.
    ``trials_per_job``: how many trials a resident worker runs before a new job takes its place (None: any number).
    ``timeout_min`` None: no limit (local), four hours or the partition's limit if that is less (slurm).
    ``trunk_cache_gb`` bounds the disk used for the frozen layers' output (0: compute it every time), which is kept in
    ``scratch`` (None: the cache folder); best a local disk of the node. ``lean_logits`` computes logits only where the
    loss reads them, in chunks; without it TRL's own forward pass runs. ``share_prompts``: a pair's prompt is computed once.
    ``compile``: torch.compile on the decoder layers from the lowest site on; costs a minute or more at the start.
    """

    kind: str = option("local", choices=("local", "slurm"))
    slots: int | None = option(None, at_least=1)
    threads: int | None = option(None, at_least=1)
    trials_per_gpu: int = option(1, at_least=1)
    trials_per_job: int | None = option(None, at_least=1)
    timeout_min: int | None = option(None, at_least=1)
    poll_s: float = option(0.5, above=0)
    grace_s: float = option(60.0, above=0)
    heartbeat_s: float = option(1800.0, above=0)
    max_retries: int = option(2, at_least=0)
    max_failures: int = option(3, at_least=1)
    min_free_gb: float = option(1.0, at_least=0)
    resident: bool = option(True)
    packed: int | None = option(1, at_least=1)
    trunk_cache_gb: float = option(8.0, at_least=0)
    scratch: str | None = option(None)
    lean_logits: bool = option(True)
    share_prompts: bool = option(True)
    compile: bool = option(False)
    slurm: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepSpec:
    """Which W&B sweep file is run, with optional overrides of its method, number of trials and seed."""

    name: str = option("none")
    file: str | None = option(None)
    method: str | None = option(None, choices=("grid", "random", "bayes"))
    run_cap: int | None = option(None, at_least=1)
    seed: int = option(0, at_least=0)
    repeats: bool = option(False)


@dataclass(frozen=True)
class Experiment:
    """All that the composed config says."""

    model: ModelSpec
    data: DataSpec
    adapter: AdapterSpec
    orpo: OrpoSpec
    launcher: LauncherSpec
    tracker: TrackerSpec
    sweep: SweepSpec
    name: str | None = option(None)
    output: str = option("outputs")
    cache: str | None = option(None)
    tags: tuple[str, ...] = option(())
    run_prefix: str = option("run-")

    def with_params(self, params: Mapping[str, Any]) -> Experiment:
        """A copy with sampled values put at their dotted keys (``orpo.learning_rate``), checked like the config."""
        changed = self
        for key, value in params.items():
            section, name = split_key(key)
            spec = getattr(changed, section)
            updated = from_mapping(type(spec), {**to_dict(spec), name: value}, section)
            changed = dataclasses.replace(changed, **{section: updated})
        return changed

    def with_absolute_paths(self) -> Experiment:
        """A copy whose local files and folders are named from the root: another command may run in another folder."""
        data, model, adapter = self.data, self.model, self.adapter
        return dataclasses.replace(
            self,
            data=dataclasses.replace(data, path=absolute(data.path), eval_path=absolute(data.eval_path)),
            model=dataclasses.replace(
                model,
                name=absolute_if_folder(model.name) if model.source == "hub" else model.name,
                tokenizer=absolute_if_folder(model.tokenizer) if model.tokenizer else model.tokenizer,
                sites=tuple(site.with_absolute_path() for site in model.sites),
            ),
            adapter=dataclasses.replace(adapter, sites=tuple(site.with_absolute_path() for site in adapter.sites)),
            launcher=dataclasses.replace(self.launcher, scratch=absolute(self.launcher.scratch)),
            cache=absolute(self.cache),
        )


def absolute(path: str | None) -> str | None:
    """A local path from the root; None and addresses (``s3://…``) as they are."""
    return path if path is None or "://" in path else str(expanded(path).absolute())


def absolute_if_folder(name: str) -> str:
    """A model's local folder from the root; an id of the Hub as it is."""
    return str(expanded(name).absolute()) if expanded(name).is_dir() else name


def expanded(path: str) -> Path:
    """``path`` with the user's home for ``~``. A user that does not exist is no home, and no error either."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises for ~nobody)


TUNABLE = {"model": ModelSpec, "data": DataSpec, "adapter": AdapterSpec, "orpo": OrpoSpec}


@dataclass(frozen=True)
class TrialSpec:
    """Everything one trial needs, fixed when the trial is created; survives requeues unchanged."""

    index: int
    name: str
    model_name: str
    run_id: str
    sweep_id: str
    sweep_name: str
    identity: str
    created: str
    params: Mapping[str, Any]
    metric: str
    goal: str
    tags: tuple[str, ...]
    command: str
    git_commit: str | None
    experiment: Experiment

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> TrialSpec:
        experiment = from_mapping(Experiment, raw["experiment"], "")
        rest = {k: v for k, v in raw.items() if k != "experiment"}
        return cls(**{**rest, "tags": tuple(raw["tags"]), "experiment": experiment})


def total_steps(spec: OrpoSpec, pairs: int) -> int:
    """Optimiser steps of a whole run over ``pairs`` training pairs, as Trainer counts them."""
    if spec.max_steps > 0:
        return spec.max_steps
    per_epoch = math.ceil(math.ceil(pairs / spec.batch_size) / spec.gradient_accumulation)
    return math.ceil(spec.epochs * max(per_epoch, 1))


def split_key(key: str) -> tuple[str, str]:
    """``("orpo", "beta")`` of ``orpo.beta``. Raises ConfigError when a sweep may not set that key."""
    section, _, name = key.partition(".")
    valid = [f"{s}.{f.name}" for s, cls in TUNABLE.items() for f in dataclasses.fields(cls)]
    if key not in valid:
        raise ConfigError(f"a swept parameter must be a config key but got '{key}'." + suggest(key, valid))
    return section, name


def swept_value(experiment: Experiment, key: str) -> Any:
    """The value of ``experiment`` at a dotted key that a sweep may set."""
    section, name = split_key(key)
    return getattr(getattr(experiment, section), name)


@dataclass(frozen=True)
class KeyBounds:
    """What a config key takes: its ``type``, and for numbers the smallest and largest value (``above`` is left out)."""

    type: type
    above: float | None
    at_least: float | None
    at_most: float | None

    def inside(self, step: float | None) -> tuple[float, float]:
        """The smallest and the largest number, infinite without a bound. ``step``: of what numbers are multiples, if any."""
        low = -math.inf if self.at_least is None else self.at_least
        if self.above is not None:
            low = (math.floor(self.above / step) + 1) * step if step else math.nextafter(self.above, math.inf)
        return low, math.inf if self.at_most is None else self.at_most

    def __str__(self) -> str:
        bounds = {"above": self.above, "at least": self.at_least, "at most": self.at_most}
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)


def key_bounds(key: str) -> KeyBounds:
    """What the dotted ``key`` takes. Raises ConfigError when a sweep may not set it."""
    section, name = split_key(key)
    spec = TUNABLE[section]
    meta = next(f.metadata for f in dataclasses.fields(spec) if f.name == name)
    hint = typing.get_type_hints(spec)[name]
    if isinstance(hint, types.UnionType):  # an optional one
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return KeyBounds(hint, meta.get("above"), meta.get("at_least"), meta.get("at_most"))


def identity(experiment: Experiment) -> str:
    """12 hex digits that name what a trial computes: a hash of its model, data, adapter and ORPO settings.

    Left out, because they cannot change the result: fields marked ``cosmetic``, the launcher, tracker and names; and
    ``later`` fields while they are None, so that a new setting leaves the names of old trials as they are.
    """
    content = {section: _without_cosmetic(getattr(experiment, section)) for section in TUNABLE}
    content["model"].pop("sites")  # only the adapter's sites act
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:12]


def comparable(experiment: Experiment, swept: Collection[str]) -> str:
    """Equal for experiments that compute the same but for the values of the ``swept`` keys (``orpo.beta``)."""
    content = {section: _without_cosmetic(getattr(experiment, section)) for section in TUNABLE}
    content["model"].pop("sites")
    for key in swept:
        section, name = split_key(key)
        content[section].pop(name, None)
    return canonical_json(content)


def _without_cosmetic(spec: Any) -> dict[str, Any]:
    acting = [f for f in dataclasses.fields(spec) if not f.metadata.get("cosmetic")]
    given = [f.name for f in acting if not (f.metadata.get("later") and getattr(spec, f.name) is None)]
    return {name: to_dict(getattr(spec, name)) for name in given}
