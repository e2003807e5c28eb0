"""What an adapter has learned, by latent: the mean change, and how often the latent is active without and with it."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from isaerft_sweep.adapter.architecture import decoder_layers, decoder_name
from isaerft_sweep.adapter.layer import IsaerftLayer
from isaerft_sweep.trial.forward.frozen_prefix import Reached

MAX_TOKENS = 2048
"""Tokens of held-out text to measure on: enough for latents that are active on one token in a hundred."""


@dataclass(frozen=True)
class SiteChange:
    """The adapter's change at one hook point, over the measured tokens. Arrays are float32.

    ``moved`` [d_sae]: mean change of each latent (for the bias: b itself). ``vector`` [d_in]: moved @ W_dec, the mean
    change of the residual stream. ``share`` [d_sae]: each latent's contribution to ``vector``,
    (moved_i · W_dec,i · vector) / ‖vector‖², which sums to 1. ``before`` and ``after`` [d_sae]: fraction of tokens on
    which the latent is active in the residual stream without and with the adapter.
    """

    layer: int
    metadata: dict[str, Any]
    moved: np.ndarray
    vector: np.ndarray
    share: np.ndarray
    before: np.ndarray
    after: np.ndarray


@torch.no_grad()
def learned(model: peft.PeftModel, rows: Any, max_tokens: int = MAX_TOKENS) -> list[SiteChange]:
    """What each hook point's block does on the tokenised held-out ``rows``.

    The first token of each sequence is left out: it is an attention sink, with a residual stream unlike all others.
    With several hook points, each one is measured on the residual stream of the untrained model. Empty for an adapter
    without latents.
    """
    layers = decoder_layers(model.get_base_model())
    if not any(isinstance(layer, IsaerftLayer) and _has_latents(layer) for layer in layers):
        return []
    batches, was_training = _batches(rows, max_tokens), model.training
    model.eval()
    with model.disable_adapter():
        before = _streams(model, batches)
    after = _streams(model, batches)
    model.train(was_training)
    return [_change(index, layers[index], before[index], after[index]) for index in sorted(before)]  # type: ignore[arg-type]


def _has_latents(layer: IsaerftLayer) -> bool:
    return layer.saes[layer.active_adapters[0]].basis == "sae"


def _batches(rows: Any, max_tokens: int) -> list[list[int]]:
    """Token sequences of chosen and rejected answers in turn, up to ``max_tokens`` in total."""
    sequences: list[list[int]] = []
    total = 0
    for row in rows:
        for side in ("chosen", "rejected"):
            sequence = list(row[f"{side}_ids"])
            if total + len(sequence) > max_tokens and sequences:
                return sequences
            sequences.append(sequence)
            total += len(sequence)
    return sequences


def _streams(model: peft.PeftModel, sequences: list[list[int]]) -> dict[int, torch.Tensor]:
    """The residual stream [tokens, d_in] at each hook point, float32, by layer."""
    base: Any = model.get_base_model()
    decoder = getattr(base, decoder_name(base))
    streams: dict[int, list[torch.Tensor]] = {}

    def keep(index: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            stream = output[0] if isinstance(output, tuple) else output
            streams.setdefault(index, []).append(stream[0, 1:].float())
            if index == highest:
                raise Reached

        return hook

    hook_points = {i: layer for i, layer in enumerate(decoder_layers(base)) if isinstance(layer, IsaerftLayer)}
    highest = max(hook_points)
    with ExitStack() as stack:
        for index, layer in hook_points.items():
            stack.callback(layer.register_forward_hook(keep(index)).remove)
        for sequence in sequences:
            ids = torch.tensor([sequence], device=next(model.parameters()).device)
            with suppress(Reached):
                decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return {index: torch.cat(parts) for index, parts in streams.items()}


def _change(index: int, layer: IsaerftLayer, before: torch.Tensor, after: torch.Tensor) -> SiteChange:
    name = layer.active_adapters[0]
    sae, block, decoder = layer.saes[name], layer.isaerft_block[name], layer.decoder(name)
    latents = sae.encode(before)
    moved = block(latents) if block.needs_latents else block()
    moved = moved.float().reshape(-1, decoder.shape[0]).mean(0)
    vector = moved @ decoder
    share = moved * (decoder @ vector) / vector.dot(vector).clamp_min(torch.finfo(torch.float32).tiny)
    arrays = [moved, vector, share, (latents > 0).float().mean(0), (sae.encode(after) > 0).float().mean(0)]
    metadata = {
        "tokens": len(before),
        "d_sae": decoder.shape[0],
        "neuronpedia_id": sae.sae.cfg.metadata.get("neuronpedia_id"),
        "fingerprint": sae.fingerprint,
    }
    return SiteChange(index, metadata, *(a.cpu().numpy() for a in arrays))


def write_changes(path: Path, changes: list[SiteChange]) -> None:
    """Write one file for all hook points, atomically: arrays ``<layer>.moved`` and so on, and ``sites`` as JSON."""
    arrays: dict[str, Any] = {"sites": json.dumps([{"layer": c.layer, **c.metadata} for c in changes])}
    for change in changes:
        for name in ("moved", "vector", "share", "before", "after"):
            arrays[f"{change.layer}.{name}"] = getattr(change, name).astype(np.float32)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as file:
        np.savez(file, **arrays)
    os.chmod(aside, 0o644)
    os.replace(aside, path)
