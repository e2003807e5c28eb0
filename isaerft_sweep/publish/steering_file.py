"""Writes an adapter as the steering vector that EleutherAI's lm-evaluation-harness reads (``--model steered``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from isaerft_sweep.adapter.architecture import decoder_layers, decoder_layers_name
from isaerft_sweep.adapter.blocks import BiasBlock
from isaerft_sweep.adapter.layer import IsaerftLayer
from isaerft_sweep.adapter.load import base_model_of, load_model
from isaerft_sweep.adapter.strength import set_strength
from isaerft_sweep.adapter.system_prompt import check_changes_model
from isaerft_sweep.errors import FolderError, ModelError
from isaerft_sweep.models.loading import resolve


def write_steering_file(adapter: Path, out: Path | None, cache: str | None, strength: float = 1.0) -> tuple[Path, str]:
    """The file, and the base model's name or folder for the harness.

    Args:
        adapter: a folder with an adapter whose change is a constant vector (bias, random, vector, diffmean).
        out: the file to create, ``.pt``; None: ``steering.pt`` beside the adapter.
        cache: the folder of converted models.
        strength: multiple of the adapter's change.

    Raises ModelError for an adapter of another kind, FolderError when the file exists or cannot be written.
    """
    target = (out or adapter.absolute().parent / "steering.pt").expanduser().absolute()
    if target.suffix not in (".pt", ".pth"):
        raise FolderError(f"--out must end in .pt, by which the harness knows the file, but got '{target}'.")
    if target.exists():
        raise FolderError(f"'{target}' must not exist yet. Choose another file with --out, or remove it.")
    model, _ = load_model(str(adapter), cache=cache, dtype="float32")
    check_changes_model(model)
    set_strength(model, strength)
    base: Any = model.get_base_model()
    # the harness looks for names below the model's own base_model, such as layers.20
    name = decoder_layers_name(base).removeprefix(f"{base.base_model_prefix}.")
    entries: dict[str, Any] = {}
    for index, layer in enumerate(decoder_layers(base)):
        if isinstance(layer, IsaerftLayer):
            adapter_name = layer.active_adapters[0]
            block = layer.isaerft_block[adapter_name]
            if not isinstance(block, BiasBlock):
                break
            vector = layer.change(adapter_name, torch.zeros(1, 1, layer.decoder(adapter_name).shape[1]))
            entries[f"{name}.{index}"] = {
                "action": "add",
                "steering_vector": vector.detach().cpu().clone(),
                "steering_coefficient": 1.0,
                "bias": None,
                "head_index": None,
            }
    else:
        if entries:
            _save(entries, target)
            # a model that is not on the Hub has been converted into a folder, which the harness can read
            return target, resolve(base_model_of(str(adapter)), cache)[0]
    raise ModelError(
        "the harness adds one vector to the residual stream, so the adapter must be of kind bias, random, vector or "
        "diffmean. Export another kind as a model: isaerft-sweep export, and evaluate the folder with --model hf."
    )


def _save(entries: dict[str, Any], target: Path) -> None:
    """Write aside and rename: the file is there whole or not at all."""
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        torch.save(entries, aside)
        os.replace(aside, target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise FolderError(f"'{target}' cannot be written: {error.strerror}.") from error
