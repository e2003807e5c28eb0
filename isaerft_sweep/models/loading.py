"""Loads a frozen language model and its tokenizer: from the Hub's cache, a folder, a package, or made at random."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from isaerft_sweep.errors import ModelError
from isaerft_sweep.models import gguf_package, random_model
from isaerft_sweep.paths import cache_folder
from isaerft_sweep.specs import ModelSpec


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with every parameter frozen, on ``device``, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def device() -> torch.device:
    """The device of this trial: the first visible GPU, else the processor."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def resolve(spec: ModelSpec, cache: str | None) -> tuple[str, str]:
    """Names or folders that transformers can load: ``(model, tokenizer)``. Makes what has to be made once."""
    makers: dict[str, Callable[[ModelSpec, Path], Path]] = {
        "package": gguf_package.converted_folder,
        "random": random_model.made_folder,
    }
    if spec.source in makers:
        made = str(makers[spec.source](spec, cache_folder(cache)))
        return made, made
    return spec.name, spec.tokenizer or spec.name


def load_config(spec: ModelSpec, cache: str | None) -> Any:
    """The model's config alone: cheap, no weights. Raises ModelError when it cannot be had."""
    name, _ = resolve(spec, cache)
    return _loading(spec, lambda: AutoConfig.from_pretrained(name, revision=spec.revision))


def load_tokenizer(spec: ModelSpec, cache: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token. Raises ModelError when it cannot be had."""
    _, name = resolve(spec, cache)
    revision = spec.revision if name == spec.name else None
    tokenizer = _loading(spec, lambda: AutoTokenizer.from_pretrained(name, revision=revision))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(spec: ModelSpec, cache: str | None) -> LoadedModel:
    """Model and tokenizer. Raises ModelError when either cannot be had."""
    name, _ = resolve(spec, cache)
    model = _loading(
        spec,
        lambda: AutoModelForCausalLM.from_pretrained(
            name, revision=spec.revision, dtype=_dtype(spec), attn_implementation=spec.attention
        ),
    )
    model.requires_grad_(False)
    model.config.use_cache = False
    # cards and adapters must name the model that people know, not this machine's folder
    model.config._name_or_path = model.name_or_path = spec.name
    return LoadedModel(model.to(device()).eval(), load_tokenizer(spec, cache))


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model's modules over the same parameters and buffers: what is put on the copy leaves ``model`` alone."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def without_dropout(loaded: LoadedModel) -> LoadedModel:
    """The same model with no dropout left, for training.

    TRL's trainers switch it off too, but reach only modules: attention's, and all of OPT's, is a number of a layer, Falcon's
    one of the config. What is stored for all trials, or computed for some together, could not hold each one's draws.
    """
    model = loaded.model
    for place in (*model.modules(), model.config, model.config.get_text_config()):
        numbers = [name for name, value in vars(place).items() if "drop" in name and isinstance(value, float)]
        for name in [*numbers, *(["p"] if isinstance(place, nn.Dropout) else [])]:
            setattr(place, name, 0.0)
    return loaded


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """torch.compile on each layer, for lengths that vary: one compilation serves all layers that are alike."""
    for layer in layers:
        layer.compile(dynamic=True)


def _dtype(spec: ModelSpec) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU that has it, float32 elsewhere."""
    if spec.dtype != "auto":
        dtype: torch.dtype = getattr(torch, spec.dtype)
        return dtype
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def _loading(spec: ModelSpec, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, ImportError) as error:
        where = "a local folder" if Path(spec.name).exists() else "the Hub's cache on this machine or the Hub"
        offline = " HF_HUB_OFFLINE is set, so the Hub was not asked." if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ModelError(
            f"model.name must be a causal language model that can be loaded, but '{spec.name}' could not be had "
            f"from {where}.{offline} First reason: {str(error).splitlines()[0]} Check the name and your access, or "
            f"on a machine with internet run `hf download {spec.name}`, or give a local folder: model.name=/path."
        ) from error
