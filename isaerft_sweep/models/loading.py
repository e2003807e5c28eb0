"""Loads a frozen language model and its tokenizer: from the Hub's cache, a folder, a package, or with random weights."""

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
    """The device of this trial: the first visible GPU, else the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def resolve(spec: ModelSpec, cache: str | None) -> tuple[str, str]:
    """Names or folders that transformers can load: ``(model, tokenizer)``. Creates converted and random models once."""
    makers: dict[str, Callable[[ModelSpec, Path], Path]] = {
        "package": gguf_package.converted_folder,
        "random": random_model.made_folder,
    }
    if spec.source in makers:
        folder = str(makers[spec.source](spec, cache_folder(cache)))
        return folder, folder
    return spec.name, spec.tokenizer or spec.name


def load_config(spec: ModelSpec, cache: str | None) -> Any:
    """The model's config, without its weights. Raises ModelError when it cannot be loaded."""
    name, _ = resolve(spec, cache)
    return _loading(spec, lambda: AutoConfig.from_pretrained(name, revision=spec.revision))


def load_tokenizer(spec: ModelSpec, cache: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token. Raises ModelError when it cannot be loaded."""
    _, name = resolve(spec, cache)
    revision = spec.revision if name == spec.name else None
    tokenizer = _loading(spec, lambda: AutoTokenizer.from_pretrained(name, revision=revision))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(spec: ModelSpec, cache: str | None) -> LoadedModel:
    """Model and tokenizer. Raises ModelError when either cannot be loaded."""
    name, _ = resolve(spec, cache)
    model = _loading(
        spec,
        lambda: AutoModelForCausalLM.from_pretrained(
            name, revision=spec.revision, dtype=_dtype(spec), attn_implementation=spec.attention
        ),
    )
    model.requires_grad_(False)
    model.config.use_cache = False
    # cards and adapters must name the published model, not a local folder
    model.config._name_or_path = model.name_or_path = spec.name
    return LoadedModel(model.to(device()).eval(), load_tokenizer(spec, cache))


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model's modules with the same parameters and buffers: adding modules to it does not change ``model``."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def without_dropout(loaded: LoadedModel) -> LoadedModel:
    """The same model without any dropout, for training: cached or co-batched activations could not have each trial's own.

    TRL's trainers also disable dropout, but only in modules. Attention layers, and all of OPT, hold its probability in an
    attribute of the layer, Falcon in the config.
    """
    remove_dropout(loaded.model)
    return loaded


def remove_dropout(model: PreTrainedModel) -> None:
    """Set each probability of dropout in the model to 0."""
    for holder in (*model.modules(), model.config, model.config.get_text_config()):
        probabilities = [name for name, value in vars(holder).items() if "drop" in name and isinstance(value, float)]
        for name in [*probabilities, *(["p"] if isinstance(holder, nn.Dropout) else [])]:
            setattr(holder, name, 0.0)


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """torch.compile on each layer with dynamic shapes: layers with the same code share one compilation."""
    for layer in layers:
        layer.compile(dynamic=True)


def _dtype(spec: ModelSpec) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU that supports it, float32 elsewhere."""
    if spec.dtype != "auto":
        dtype: torch.dtype = getattr(torch, spec.dtype)
        return dtype
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def _loading(spec: ModelSpec, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, ImportError) as error:
        where = "a local folder" if Path(spec.name).exists() else "the Hub's cache on this machine or the Hub"
        offline = " HF_HUB_OFFLINE is set, so the Hub was not tried." if os.environ.get("HF_HUB_OFFLINE") else ""
        advice = (
            "Check that it is a whole model's folder (config.json, weights, tokenizer)."
            if Path(spec.name).exists()
            else f"Check the name and your access, or on a machine with internet run `hf download {spec.name}`, or give a "
            "local folder: model.name=/path."
        )
        raise ModelError(
            f"model.name must be a causal language model that can be loaded, but '{spec.name}' could not be loaded "
            f"from {where}.{offline} First reason: {str(error).splitlines()[0]} {advice}"
        ) from error
