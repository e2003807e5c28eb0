"""Loads a saved adapter with its base model, ready to generate."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from isaerft_sweep.adapter.config import IsaerftConfig
from isaerft_sweep.errors import ModelError
from isaerft_sweep.guard import ignore_pefts_old_name
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.models.gguf_package import PACKAGES
from isaerft_sweep.models.loading import load
from isaerft_sweep.specs import ModelSpec


def load_model(
    adapter: str, base: ModelSpec | None = None, cache: str | None = None, dtype: str | None = None
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base model with the adapter on it, ready to generate, and its tokenizer.

    Args:
        adapter: a folder with ``adapter_config.json``, or a Hub repository.
        base: the base model; None: that of the trial whose folder holds the adapter, else the one that the adapter names.
        cache: folder of converted models; None: the user's cache folder.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``; None: the base's.
    """
    base = base or base_model_of(adapter)
    loaded = load(replace(base, dtype=dtype or base.dtype), cache)
    loaded.model.config.use_cache = True
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        ignore_pefts_old_name()
        try:
            model = PeftModel.from_pretrained(loaded.model, adapter)
        except SafetensorError as error:
            raise ModelError(f"the weights of the adapter '{adapter}' cannot be read: {error}.") from error
        except UserWarning as error:
            raise ModelError(
                f"the adapter's weights must be for {base.name} but do not have its names: load it on the model that it was "
                f"trained on. {str(error).splitlines()[0][:300]}"
            ) from error
    return model.eval(), loaded.tokenizer


def base_model_of(adapter: str) -> ModelSpec:
    """The base model: that of the trial whose folder holds the adapter, else the one that the adapter names.

    Raises ModelError when ``adapter``, a folder or a repository of the Hub, is no ISAERFT or LoRA adapter, or names none.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"an adapter must be a folder or Hub repository with adapter_config.json, but '{adapter}' has none "
            "that can be read. Give the folder `adapter` of a finished trial."
        ) from error
    if not isinstance(config, (IsaerftConfig, LoraConfig)):
        raise ModelError(f"the adapter '{adapter}' must be of type ISAERFT or LORA but is of type {config.peft_type}.")
    name = config.base_model_name_or_path
    trial = TrialFolder(Path(adapter).absolute().parent)
    if trial.spec.is_file() and Path(adapter).name == trial.adapter.name:
        return trial.read_spec().experiment.model
    if not name:
        raise ModelError(f"the adapter '{adapter}' does not name its base model: give one.")
    source = "package" if name in PACKAGES else "hub"
    return ModelSpec(name=name, tokenizer=_tokenizer(adapter), source=source, revision=config.revision)


def _tokenizer(adapter: str) -> str | None:
    """``adapter`` if it holds the tokenizer used in training (the base model's may have no chat template), else None."""
    filename = "tokenizer_config.json"
    if Path(adapter).is_dir():
        return adapter if (Path(adapter) / filename).is_file() else None
    try:
        hf_hub_download(adapter, filename)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None
    return adapter
