"""The frozen layers up to the lowest site, run once: their output is the same in every trial and epoch of a sweep.

Kept as one memory-mapped file per (model, site, data), named by a hash of all of it, made by whoever comes first and
shared by every worker of the node. Training and evaluation then run only the layers above the site: in the model, the
layers below pass their input through, and the site's own layer hands out the stored output for the batch at hand, so
that TRL's and transformers' code stay as they are.

Values are stored in the model's own dtype. They are computed in other batches than TRL would form, so they may differ
in the last bits; positions of padding are zeros, which no loss reads (but TRL's ``logits/…`` means include them).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import peft
import torch
import transformers
from torch import nn

from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.adapter.layer import IsaerftLayer
from isaerft_sweep.errors import IsaerftError
from isaerft_sweep.journal.files import locked, made_once, read_json, write_json
from isaerft_sweep.plain import canonical_json
from isaerft_sweep.specs import ModelSpec

TOKENS_PER_BATCH = 2048
_STORED: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype("float32"),
    torch.float16: np.dtype("float16"),
    torch.bfloat16: np.dtype("uint16"),
}


class _Reached(Exception):
    """The forward pass has reached the site; the rest is not wanted."""


@dataclass(frozen=True)
class StoredTrunk:
    """Residual streams of token sequences: ``values`` [all tokens, hidden], found by the hash of a sequence."""

    values: np.ndarray
    places: dict[str, tuple[int, int]]
    dtype: torch.dtype

    def batch(self, ids: torch.Tensor, mask: torch.Tensor, device: torch.device) -> torch.Tensor | None:
        """The stream for ids and mask [batch, position]; zeros at padding; None when a sequence is not stored."""
        out = torch.zeros(*ids.shape, self.values.shape[1], dtype=self.dtype)
        for row, (sequence, kept) in enumerate(zip(ids.cpu(), mask.cpu().bool(), strict=True)):
            place = self.places.get(sequence_key(sequence[kept].tolist()))
            if place is None:
                return None
            found = torch.from_numpy(np.array(self.values[place[0] : place[0] + place[1]]))
            out[row, kept] = found.view(self.dtype) if self.dtype == torch.bfloat16 else found
        return out.to(device)


def sequence_key(tokens: Sequence[int]) -> str:
    """A hash of one token sequence."""
    return hashlib.blake2b(np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=12).hexdigest()


def sequences_of(*datasets: Any) -> list[list[int]]:
    """The different token sequences that ORPOTrainer's tokenised data sets will show the model, by length."""
    found = {tuple(row[f"{side}_input_ids"]) for data in datasets for row in data for side in ("chosen", "rejected")}
    return [list(s) for s in sorted(found, key=lambda s: (len(s), s))]


def stored_trunk(
    model: peft.PeftModel, spec: ModelSpec, sequences: list[list[int]], folder: Path, limit_gb: float
) -> StoredTrunk | None:
    """The trunk's output for ``sequences``, from ``folder`` or computed and put there; None when it would be too large."""
    layers = decoder_layers(model.get_base_model())
    site = lowest_site(layers)
    dtype, hidden = next(model.parameters()).dtype, model.get_input_embeddings().weight.shape[-1]
    total = sum(len(s) for s in sequences)
    needed_bytes = total * hidden * _STORED[dtype].itemsize
    if needed_bytes > limit_gb * 1e9:
        return None
    what = {
        "model": [
            spec.name,
            spec.revision,
            spec.architecture,
            spec.attention,
            str(dtype),
            _weights_digest(model, layers, site),
        ],
        "site": site,
        "device": next(model.parameters()).device.type,
        "versions": [torch.__version__, transformers.__version__],
        "sequences": [sequence_key(s) for s in sequences],
    }
    name = hashlib.sha256(canonical_json(what).encode()).hexdigest()[:20]

    def make(aside: Path) -> None:
        with locked(folder / ".room"):
            _make_room(folder, limit_gb * 1e9 - needed_bytes)
        _compute(model, layers, site, sequences, total, aside)

    for _ in range(2):
        entry = made_once(folder / name, make)
        values = _open(entry, (total, hidden))
        if values is not None:
            os.utime(entry)  # the least recently used goes first
            return StoredTrunk(values, _places(sequences), dtype)
        print(f"the stored activations in {entry} are damaged: made again", flush=True)
        shutil.rmtree(entry, ignore_errors=True)
    raise IsaerftError(f"the disk of {folder} does not keep what is written to it; choose another: launcher.scratch=PATH.")


def _make_room(folder: Path, allowed_bytes: float) -> None:
    """Delete the least recently used entries until the rest is within ``allowed_bytes``.

    A worker that still reads a deleted entry keeps its mapping until it ends.
    """
    # names that begin with a dot are being made by another worker at this moment
    entries = [p.parent for p in folder.glob("*/values.npy") if not p.parent.name.startswith(".")]
    entries.sort(key=lambda entry: entry.stat().st_mtime)
    sizes = {entry: (entry / "values.npy").stat().st_size for entry in entries}
    while entries and sum(sizes[e] for e in entries) > allowed_bytes:
        shutil.rmtree(entries.pop(0), ignore_errors=True)


def lowest_site(layers: nn.ModuleList) -> int:
    """Index of the lowest decoder layer that has an adapter."""
    return next(i for i, layer in enumerate(layers) if isinstance(layer, IsaerftLayer))


def site_layer(layers: nn.ModuleList, site: int) -> IsaerftLayer:
    """The decoder layer with an adapter on it."""
    return cast(IsaerftLayer, layers[site])


def _weights_digest(model: peft.PeftModel, layers: nn.ModuleList, site: int) -> str:
    """A hash of the config and a sample of every trunk weight: the same name may hide another model."""
    base = model.get_base_model()
    digest = hashlib.sha256(base.config.to_json_string().encode())
    for module in (base.get_input_embeddings(), *layers[: site + 1]):
        for parameter in module.parameters():
            if not parameter.requires_grad:
                digest.update(
                    parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].float().cpu().numpy().tobytes()
                )
    return digest.hexdigest()[:20]


def _batches(sequences: list[list[int]]) -> Iterator[list[list[int]]]:
    """Sequences of near length together, at most ``TOKENS_PER_BATCH`` tokens with padding."""
    batch: list[list[int]] = []
    for sequence in sequences:
        if batch and (len(batch) + 1) * len(sequence) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


@torch.no_grad()
def stream_at(base: nn.Module, layer: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The residual stream [sequence, position, hidden] that ``layer`` of ``base`` gives out; what is above is not run."""
    caught: list[torch.Tensor] = []

    def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = layer.register_forward_hook(catch)
    try:
        with suppress(_Reached):
            base(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


@torch.no_grad()
def _compute(
    model: peft.PeftModel, layers: nn.ModuleList, site: int, sequences: list[list[int]], total: int, folder: Path
) -> None:
    base = model.get_base_model()
    base.eval()  # what is stored must not hold anybody's dropout
    first = next(model.parameters())
    hidden, stored = model.get_input_embeddings().weight.shape[-1], _STORED[first.dtype]
    values = np.lib.format.open_memmap(folder / "values.npy", mode="w+", dtype=stored, shape=(total, hidden))
    at, digest = 0, hashlib.sha256()
    for batch in _batches(sequences):
        width = max(len(s) for s in batch)
        ids = torch.tensor([s + [0] * (width - len(s)) for s in batch], device=first.device)
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in batch], device=first.device)
        stream = stream_at(base, site_layer(layers, site).base_layer, ids, mask)
        for row, sequence in zip(stream.cpu(), batch, strict=True):
            kept = row[: len(sequence)].contiguous()
            values[at : at + len(sequence)] = (
                kept.view(torch.uint16).numpy() if first.dtype == torch.bfloat16 else kept.numpy()
            )
            digest.update(values[at : at + len(sequence)].tobytes())
            at += len(sequence)
    values.flush()
    write_json(folder / "digest.json", {"sha256": digest.hexdigest(), "tokens": total})


def _open(entry: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The values of an entry, or None when they are not what was written."""
    try:
        values = np.load(entry / "values.npy", mmap_mode="r")
    except (OSError, ValueError):
        return None  # another worker has made room, or the file is not what was written
    digest = hashlib.sha256()
    for start in range(0, len(values), 4096):
        digest.update(values[start : start + 4096].tobytes())
    whole = values.shape == shape and (read_json(entry / "digest.json") or {}).get("sha256") == digest.hexdigest()
    return values if whole else None


def _places(sequences: list[list[int]]) -> dict[str, tuple[int, int]]:
    """Where each sequence's values begin, and how many there are."""
    places, at = {}, 0
    for sequence in sequences:
        places[sequence_key(sequence)] = (at, len(sequence))
        at += len(sequence)
    return places
