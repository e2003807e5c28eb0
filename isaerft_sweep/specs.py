"""Frozen, checked specs of a model, data set, adapter, loss, trial and sweep; plain data, no torch."""

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
from isaerft_sweep.spec_fields import canonical_json, from_mapping, option, to_dict


@dataclass(frozen=True)
class HookPoint:
    """One residual-stream site: the output of decoder layer ``layer``, read and written through one frozen SAE."""

    layer: int = option("Index of the decoder layer whose output is the hook point (blocks.N.hook_resid_post).", at_least=0)
    sae_release: str | None = option("Release of the SAE in sae_lens, with sae_id.", None)
    sae_id: str | None = option("Id of the SAE in its release.", None)
    sae_path: str | None = option("Local folder of the SAE, as sae_lens saves it; instead of sae_release and sae_id.", None)

    def with_absolute_path(self) -> HookPoint:
        return dataclasses.replace(self, sae_path=absolute(self.sae_path))


@dataclass(frozen=True)
class ModelSpec:
    """A frozen decoder-only language model."""

    name: str = option("Hub id or local folder of the model.")
    tokenizer: str | None = option("Hub id or folder of the tokenizer and chat template; null: the model's own.", None)
    source: str = option(
        "Where the weights are: the Hub or a local folder (hub), an installed Python package (package), or made at random "
        "for tests (random).",
        "hub",
        choices=("hub", "package", "random"),
    )
    architecture: str | None = option(
        "Architecture of a random model: llama, gemma2, gemma3_text, qwen2, qwen3 or gpt_neox.", None
    )
    revision: str | None = option("Branch, tag or commit on the Hub; null: main.", None)
    dtype: str = option(
        "Dtype of the frozen model; auto: bfloat16 on a GPU that has it, else float32.",
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    attention: str | None = option(
        "Attention implementation; null: transformers' choice, SDPA where the model has it.",
        None,
        choices=("eager", "sdpa", "flash_attention_2"),
    )
    license: str | None = option("License of the model, for the model card.", None, affects_result=False)
    sites: tuple[HookPoint, ...] = option(
        "Hook points and SAEs that go with the model; adapter.sites takes them unless it names its own.", ()
    )

    @property
    def short_name(self) -> str:
        """The name without its owner or folder: ``gemma-2-2b`` of ``google/gemma-2-2b``."""
        return self.name.rstrip("/").split("/")[-1]


@dataclass(frozen=True)
class DataSpec:
    """Preference pairs. Slices (``train[:1000]``) select rows of a Hub data set's split; sizes select pairs of a file."""

    name: str = option("Hub id of the data set, or a name for your own.")
    source: str = option(
        "A data set of the Hub (hub), your own files (files) or the pairs that ship with the package (builtin).",
        "hub",
        choices=("hub", "files", "builtin"),
    )
    path: str | None = option("File of training pairs: .jsonl, .jsonl.gz or .parquet.", None)
    eval_path: str | None = option(
        "File of held-out pairs; null: eval_size pairs of path are held out, whole prompts at a time.", None
    )
    train_split: str = option("Split and slice of a Hub data set to train on.", "train")
    eval_split: str = option("Split and slice of a Hub data set to evaluate on.", "test")
    train_size: int | None = option("Number of training pairs; null: all.", None, at_least=1)
    eval_size: int | None = option("Number of held-out pairs; null: all of the evaluation split or file.", None, at_least=1)
    test_split: str | None = option(
        "Split and slice of a Hub data set that no ranking sees: evaluated when a trial ends; null: none.",
        None,
        affects_result=False,
    )
    test_size: int | None = option(
        "Number of test pairs, which no ranking sees, of a file's pairs neither trained on nor held out; null: as many as "
        "are held out, if so many are left.",
        None,
        at_least=0,
        affects_result=False,
    )
    seed: int = option("Seed of the choice of held-out pairs.", 0, at_least=0)
    neutral_path: str | None = option(
        "Text that has nothing to do with the pairs, a text per line, on which harm is measured; null: the package's own.",
        None,
        omit_from_hash_if_default=True,
    )
    license: str | None = option("License of the data, for the model card.", None, affects_result=False)

    def with_absolute_paths(self) -> DataSpec:
        """A copy with absolute paths of local files."""
        neutral = absolute(self.neutral_path)
        return dataclasses.replace(self, path=absolute(self.path), eval_path=absolute(self.eval_path), neutral_path=neutral)


@dataclass(frozen=True)
class AdapterSpec:
    """The adapter: a trainable block on the latents of frozen SAEs."""

    kind: str = option(
        "The trainable block on the latents f. bias: f + b; scale: f·(1 + s); linear: f + Wf + c; mlp: f + MLP(f). "
        "To compare with: random (bias on random directions); vector, diffmean, loreft (on the stream, without SAE); lora "
        "(on the layers above the hook point); prompt (a system prompt, nothing is trained).",
        "bias",
        choices=("bias", "scale", "linear", "mlp", "random", "vector", "diffmean", "loreft", "lora", "prompt"),
    )
    sites: tuple[HookPoint, ...] = option("Hook points, each with its SAE.", ())
    rank: int | None = option(
        "Rank of linear and mlp blocks, null: full; of lora, null: 8; of loreft, null: 4.", None, at_least=1
    )
    strength: float = option(
        "diffmean: how many times the difference of means is added.", 1.0, at_least=0, omit_from_hash_if_default=True
    )
    system_prompt: str | None = option(
        "prompt: the text of the system prompt that every held-out prompt gets.", None, omit_from_hash_if_default=True
    )
    hidden_size: int | None = option("Width of an mlp's hidden layers; null: the number of latents.", None, at_least=1)
    hidden_layers: int = option("Number of an mlp's hidden layers.", 1, at_least=1)
    l1: float | None = option(
        "Weight of the L1 penalty on bias or scale, which leaves few non-zero entries; null: none.",
        None,
        at_least=0,
        omit_from_hash_if_default=True,
    )
    top_k: int | None = option(
        "Number of latents that a bias or scale adapter changes; null: all.",
        None,
        at_least=1,
        omit_from_hash_if_default=True,
    )
    force_hook: bool = option("Take an SAE whose own config names another hook point or model.", False, affects_result=False)


@dataclass(frozen=True)
class OrpoSpec:
    """The loss, ORPO (arXiv 2403.07691) or another one of preference pairs, and its optimiser."""

    learning_rate: float = option("Peak learning rate.", above=0)
    beta: float = option(
        "ORPO: weight of the odds-ratio term, λ of arXiv 2403.07691. Other losses: scale of the rewards.", at_least=0
    )
    loss: str = option(
        "Loss of a pair: orpo; dpo (arXiv 2305.18290), whose reference is the model without the adapter; simpo (2405.14734);"
        " cpo (2401.08417).",
        "orpo",
        choices=("orpo", "dpo", "simpo", "cpo"),
        omit_from_hash_if_default=True,
    )
    gamma: float = option("SimPO's target margin between the rewards.", 0.5, at_least=0, omit_from_hash_if_default=True)
    epochs: float = option("Passes over the training pairs, unless max_steps is set.", 1.0, above=0)
    max_steps: int = option("Number of optimiser steps; -1: epochs decides.", -1, at_least=-1)
    max_length: int = option("Longest prompt with answer, in tokens; longer answers are truncated.", 1024, at_least=2)
    batch_size: int = option("Pairs a forward pass.", 2, at_least=1)
    eval_batch_size: int = option("Pairs a forward pass of an evaluation.", 8, at_least=1)
    gradient_accumulation: int = option("Forward passes an optimiser step.", 8, at_least=1)
    warmup_steps: int = option("Steps in which the learning rate rises from 0.", 10, at_least=0)
    schedule: str = option(
        "Course of the learning rate after the warm-up.",
        "linear",
        choices=("linear", "cosine", "constant", "constant_with_warmup"),
    )
    optimizer: str = option(
        "Name of the optimiser in transformers; auto: paged_adamw_8bit on CUDA with bitsandbytes, else adamw_torch.", "auto"
    )
    weight_decay: float = option("Weight decay of the optimiser.", 0.0, at_least=0)
    max_grad_norm: float = option("Norm that gradients are clipped to; 0: not clipped.", 1.0, at_least=0)
    seed: int = option("Seed of the adapter's initial weights and of the order of the pairs.", 42, at_least=0)
    eval_fraction: float = option(
        "Share of the steps between two evaluations: 0.2 evaluates five times.", 0.2, above=0, at_most=1
    )
    eval_untrained: str = option(
        "Evaluate before the first step: in the sweep's first trial, whose result holds for all (first), in every trial "
        "(always), or never.",
        "first",
        choices=("first", "always", "never"),
        affects_result=False,
    )
    eval_harm: bool = option(
        "Measure in each evaluation how far the adapter moves the model: KL to the base, NLL of neutral text.",
        True,
        affects_result=False,
    )
    eval_generations: int = option(
        "Held-out prompts that each evaluation answers by greedy decoding, to measure length, repetition and the NLL under "
        "the base model; 0: none.",
        0,
        at_least=0,
        affects_result=False,
    )
    checkpoint_every_steps: int = option("Most steps between two checkpoints.", 50, at_least=1, affects_result=False)
    checkpoint_every_min: float = option("Most minutes between two checkpoints.", 5.0, above=0, affects_result=False)
    gradient_checkpointing: bool = option("Recompute activations in the backward pass: less memory, more time.", False)
    diverged_loss_factor: float = option(
        "A trial has diverged when its loss is this many times its first one.", 10.0, above=1, affects_result=False
    )


@dataclass(frozen=True)
class TrackerSpec:
    """Where a trial's W&B run goes. ``offline`` writes runs that ``wandb sync`` can attach to their sweep later."""

    mode: str = option(
        "W&B online (wandb), as runs on disk that `isaerft-sweep sync` uploads later (offline), or none (disabled).",
        "offline",
        choices=("wandb", "offline", "disabled"),
    )
    project: str = option("W&B project.", "orpo-isaerft-sweep")
    entity: str | None = option("W&B entity; null: your default.", None)
    tags: tuple[str, ...] = option("Tags of every W&B run and model card.", ())


@dataclass(frozen=True)
class LauncherSpec:
    """Where trials run, and how many at a time."""

    kind: str = option(
        "Where trials run: processes on this machine (local) or SLURM jobs (slurm).", "local", choices=("local", "slurm")
    )
    slots: int | None = option(
        "Workers at a time; null: trials_per_gpu per visible GPU, 1 without a GPU (local), 4 (slurm).", None, at_least=1
    )
    threads: int | None = option("CPU threads a worker; null: the cores divided by the workers.", None, at_least=1)
    trials_per_gpu: int = option("Workers that share a GPU.", 1, at_least=1)
    trials_per_job: int | None = option(
        "Trials that a worker runs before another job takes its place; null: any number.", None, at_least=1
    )
    timeout_min: int | None = option(
        "Time limit of a job, minutes; null: none (local), four hours or the partition's limit (slurm).",
        None,
        at_least=1,
    )
    poll_s: float = option("Seconds between two polls of the trials.", 0.5, above=0)
    grace_s: float = option(
        "Seconds that a trial has to write a checkpoint when it is asked to stop, or before its job's time limit.",
        60.0,
        above=0,
    )
    heartbeat_s: float = option("Seconds of silence after which a worker counts as hung.", 1800.0, above=0)
    max_retries: int = option("Attempts after failures that a trial gets before it is given up.", 2, at_least=0)
    max_failures: int = option("Trials given up, with none completed, after which the sweep ends.", 3, at_least=1)
    min_free_gb: float = option("Free disk that a sweep needs to start, GB.", 1.0, at_least=0)
    resident: bool = option(
        "Keep a worker for many trials: one start, one model, one tokenisation. false: a process for each trial.", True
    )
    trials_per_pass: int | None = option(
        "Trials that a worker trains in one forward pass; null: as many as make it faster, measured on the device.",
        1,
        at_least=1,
        formerly="packed",
    )
    activation_cache_gb: float = option(
        "Most disk for the activation cache, the output of the frozen layers, GB; 0: compute it in every step.",
        8.0,
        at_least=0,
        formerly="trunk_cache_gb",
    )
    scratch: str | None = option(
        "Folder of the activation cache, best on a local disk of the node; null: the cache folder.", None
    )
    lean_logits: bool = option("Compute logits only where the loss reads them. false: the model's own forward pass.", True)
    share_prompts: bool = option("Compute a pair's prompt once for both answers.", True)
    compile: bool = option("torch.compile the layers from the hook point up; costs a minute or more at the start.", False)
    slurm: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Flags of sbatch, with _ for -; one that the config does not list: +launcher.slurm.FLAG=VALUE."},
    )


@dataclass(frozen=True)
class StopSpec:
    """When a sweep starts no further trial before its run_cap; null: never for that reason."""

    probability_best: float | None = option(
        "Stop once the winner is the best of all trials with this probability.", None, above=0, at_most=1
    )
    expected_gain: float | None = option(
        "Stop once another trial is expected to better the metric by less than this (method bayes).", None, at_least=0
    )
    device_hours: float | None = option("Stop once the trials have used this much device time.", None, above=0)


@dataclass(frozen=True)
class SweepSpec:
    """Which W&B sweep file is run, with optional overrides of its method, number of trials and seed."""

    name: str = option("Name of the sweep file, or none for a single trial.", "none")
    file: str | None = option("Path of the sweep file; sweep=none sweep.file=PATH runs your own.", None)
    method: str | None = option("Search method instead of the file's.", None, choices=("grid", "random", "bayes"))
    run_cap: int | None = option(
        "Number of trials instead of the file's; a larger one adds trials to the sweep.", None, at_least=1
    )
    seed: int = option("Seed of the search.", 0, at_least=0)
    repeats: bool = option("Whether a point may repeat.", False)
    seeds: int = option(
        "Seeds a point, at most: good points run again with new seeds, bad ones stay with one. run_cap counts all runs.",
        1,
        at_least=1,
        omit_from_hash_if_default=True,
    )
    start: tuple[dict[str, Any], ...] = option(
        "Points to run first, such as [{orpo.learning_rate: 0.05, orpo.beta: 2}]; a key that is left out keeps the config's "
        "value.",
        (),
        affects_result=False,
    )
    prior: tuple[str, ...] = option(
        "Earlier sweeps whose results the search learns from: their folders, or wandb:ENTITY/PROJECT/ID.",
        (),
        affects_result=False,
    )
    shuffle: bool = option("Whether a grid runs in random order.", False, affects_result=False)
    emulate: bool = option(
        "Emulate trials from the recorded gradients of those that have run, to choose the next and to stop when enough is "
        "known: adapters that add a constant (bias, random, vector), orpo.loss=orpo.",
        False,
        affects_result=False,
    )
    stop: StopSpec = field(default_factory=StopSpec)


@dataclass(frozen=True)
class Experiment:
    """The composed config."""

    model: ModelSpec
    data: DataSpec
    adapter: AdapterSpec
    orpo: OrpoSpec
    launcher: LauncherSpec
    tracker: TrackerSpec
    sweep: SweepSpec
    name: str | None = option(
        "Folder of the sweep below output; null: made of the choices and the sweep's fingerprint.", None
    )
    output: str = option("Folder of all sweeps.", "outputs")
    cache: str | None = option(
        "Folder of converted models, activations and checks; null: $ISAERFT_CACHE, else the user's cache folder.", None
    )
    tags: tuple[str, ...] = option("Tags of every model card.", ())
    run_prefix: str = option("Prefix of every run's name; empty as in the later published runs.", "run-")

    def with_params(self, params: Mapping[str, Any]) -> Experiment:
        """A copy with sampled values at their dotted keys (``orpo.learning_rate``), checked like the config."""
        changed = self
        for key, value in params.items():
            section, name = split_key(key)
            spec = getattr(changed, section)
            updated = from_mapping(type(spec), {**to_dict(spec), name: value}, section)
            changed = dataclasses.replace(changed, **{section: updated})
        return changed

    def with_absolute_paths(self) -> Experiment:
        """A copy with absolute paths of local files and folders: another command may run in another folder."""
        data, model, adapter = self.data, self.model, self.adapter
        return dataclasses.replace(
            self,
            data=data.with_absolute_paths(),
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
    """A local path made absolute; None and URLs (``s3://…``) unchanged."""
    return path if path is None or "://" in path else str(expanded(path).absolute())


def absolute_if_folder(name: str) -> str:
    """A model's local folder made absolute; an id of the Hub unchanged."""
    return str(expanded(name).absolute()) if expanded(name).is_dir() else name


def expanded(path: str) -> Path:
    """``path`` with ``~`` expanded; left unchanged, without an error, for a user that does not exist."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises for ~nobody)


TUNABLE = {"model": ModelSpec, "data": DataSpec, "adapter": AdapterSpec, "orpo": OrpoSpec}


@dataclass(frozen=True)
class TrialSpec:
    """Everything that one trial needs; fixed when the trial is created, the same in every attempt."""

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
    """Optimiser steps of a complete run over ``pairs`` training pairs, as transformers' Trainer counts them."""
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
    """The value of ``experiment`` at a dotted key that a sweep may set, as plain data."""
    section, name = split_key(key)
    return to_dict(getattr(getattr(experiment, section), name))


@dataclass(frozen=True)
class KeyBounds:
    """What a config key accepts: its ``type``, and bounds for numbers (``above`` is exclusive)."""

    type: type
    above: float | None
    at_least: float | None
    at_most: float | None

    def inside(self, step: float | None) -> tuple[float, float]:
        """The smallest and largest valid number, infinite without a bound. ``step``: their common divisor, if any."""
        low = -math.inf if self.at_least is None else self.at_least
        if self.above is not None:
            low = (math.floor(self.above / step) + 1) * step if step else math.nextafter(self.above, math.inf)
        return low, math.inf if self.at_most is None else self.at_most

    def __str__(self) -> str:
        bounds = {"above": self.above, "at least": self.at_least, "at most": self.at_most}
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)


def key_bounds(key: str) -> KeyBounds:
    """What the dotted ``key`` accepts. Raises ConfigError when a sweep may not set it."""
    section, name = split_key(key)
    spec = TUNABLE[section]
    meta = next(f.metadata for f in dataclasses.fields(spec) if f.name == name)
    hint = typing.get_type_hints(spec)[name]
    if isinstance(hint, types.UnionType):  # an optional one
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return KeyBounds(hint, meta.get("above"), meta.get("at_least"), meta.get("at_most"))


def identity(experiment: Experiment) -> str:
    """12 hex digits that name what a trial computes: a hash of its model, data, adapter and ORPO settings.

    Fields that cannot change the result are left out: those with ``affects_result=False``, the launcher, tracker and names.
    So are ``omit_from_hash_if_default`` fields with their default: a new setting must not change the hashes of old trials.
    """
    content = {section: _affecting_result(getattr(experiment, section)) for section in TUNABLE}
    content["model"].pop("sites")  # the trial uses the adapter's sites
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:12]


def comparable(experiment: Experiment, swept: Collection[str]) -> str:
    """Equal for experiments that compute the same but for the values of the ``swept`` keys (``orpo.beta``)."""
    content = {section: _affecting_result(getattr(experiment, section)) for section in TUNABLE}
    content["model"].pop("sites")
    for key in swept:
        section, name = split_key(key)
        content[section].pop(name, None)
    return canonical_json(content)


def _affecting_result(spec: Any) -> dict[str, Any]:
    fields = [f for f in dataclasses.fields(spec) if f.metadata.get("affects_result") is not False]
    newer = {f.name: f.default for f in fields if f.metadata.get("omit_from_hash_if_default")}
    values = {f.name: getattr(spec, f.name) for f in fields}
    return {name: to_dict(value) for name, value in values.items() if name not in newer or value != newer[name]}
