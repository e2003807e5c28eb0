"""The activation cache: output of the frozen layers up to the lowest hook point, the same in every trial and epoch.

The cache holds one memory-mapped file per (model, hook point, data), named by a hash of all three. The first worker computes
it and every worker of the node shares it. Training and evaluation then run only the layers above the hook point: the layers
below pass their input through, and the layer at the hook point returns the cached output for the current batch, so
transformers' code needs no change.

Values have the model's dtype. They are computed in other batches than the trial's, so the last bits may differ; positions
of padding are zeros, which no loss reads.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
import peft
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.adapter.frozen_boundary import FrozenBoundary
from isaerft_sweep.adapter.layer import IsaerftLayer
from isaerft_sweep.journal.atomic_files import create_once, is_being_created, locked, read_json, write_json
from isaerft_sweep.spec_fields import canonical_json
from isaerft_sweep.specs import ModelSpec
from isaerft_sweep.trial.forward.frozen_prefix import streams_of

SPARE_BYTES = 200e6
"""Free space to leave on the disk."""
_STORED: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype("float32"),
    torch.float16: np.dtype("float16"),
    torch.bfloat16: np.dtype("uint16"),
}
LOG_INTERVAL_S = 20.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class CachePlace:
    """The folder of the activation cache, and the size limit for all its entries together."""

    folder: Path
    limit_gb: float


class NotStored(Exception):
    """The output does not go into the cache (the message says why), so every trial computes it."""


@dataclass(frozen=True)
class StoredActivations:
    """Residual streams of token sequences: ``values`` [all tokens, hidden]; ``places``: (start, length) by sequence hash."""

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
            stream = torch.from_numpy(np.array(self.values[place[0] : place[0] + place[1]]))
            out[row, kept] = stream.view(self.dtype) if self.dtype == torch.bfloat16 else stream
        return out.to(device)


def sequence_key(tokens: Sequence[int]) -> str:
    """A hash of one token sequence."""
    return hashlib.blake2b(np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=12).hexdigest()


def sequences_of(*datasets: Any) -> list[list[int]]:
    """The distinct token sequences of tokenised pairs, sorted by length."""
    distinct = {tuple(row[f"{side}_ids"]) for data in datasets for row in data for side in ("chosen", "rejected")}
    return [list(s) for s in sorted(distinct, key=lambda s: (len(s), s))]


def stored_activations(
    model: peft.PeftModel,
    spec: ModelSpec,
    sequences: list[list[int]],
    place: CachePlace,
    share: bool,
    report: Callable[[float], None] = lambda _share: None,
) -> StoredActivations:
    """The frozen layers' output for ``sequences``: read from the cache, or computed and written to it.

    Args:
        model: the model with its adapter.
        spec: the model's spec.
        sequences: token ids.
        place: the cache folder and its size limit.
        share: whether to compute a prefix of two sequences once, if the model supports it (``why_not_shared``).
        report: called after every sequence with the fraction done.

    Raises NotStored when the output does not fit the limit or the disk, or the folder cannot be written.
    """
    folder, limit_gb = place.folder, place.limit_gb
    layers = decoder_layers(model.get_base_model())
    hook_layer = lowest_hook_point(layers)
    dtype, hidden = next(model.parameters()).dtype, model.get_input_embeddings().weight.shape[-1]
    shape = (sum(len(s) for s in sequences), hidden)
    needed_bytes = shape[0] * hidden * _STORED[dtype].itemsize
    if needed_bytes > limit_gb * 1e9:
        raise NotStored(f"{needed_bytes / 1e9:.3g} GB would not fit launcher.activation_cache_gb={limit_gb:g}")
    identity = {
        "model": [
            spec.name,
            spec.revision,
            spec.architecture,
            spec.attention,
            str(dtype),
            _weights_digest(model, layers, hook_layer),
        ],
        "site": hook_layer,
        "device": next(model.parameters()).device.type,
        "versions": [torch.__version__, transformers.__version__],
        "shared prompts": share,
        "sequences": [sequence_key(s) for s in sequences],
    }
    name = hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:20]

    def write_entry(aside: Path) -> None:
        with locked(folder / ".room"):
            _make_room(folder, limit_gb * 1e9 - needed_bytes)
            values = _reserve(aside / "values.npy", shape, _STORED[dtype], needed_bytes)
        layer = layer_at_hook_point(layers, hook_layer).base_layer
        _compute(model.get_base_model(), layer, sequences, share, values, report)
        write_json(aside / "digest.json", {"sha256": _digest(values), "tokens": len(values)})

    try:
        for _ in range(2):
            entry = create_once(folder / name, write_entry)
            values = _open(entry, shape)
            if values is not None:
                os.utime(entry)  # marks the entry as recently used
                return StoredActivations(values, places_of(sequences), dtype)
            print(f"the stored activations in {entry} are damaged and are computed again", flush=True)
            shutil.rmtree(entry, ignore_errors=True)
    except OSError as error:
        raise NotStored(f"{folder} cannot be written ({error.strerror}); set another one: launcher.scratch=PATH") from error
    raise NotStored(f"the disk of {folder} returns other data than was written; set another one: launcher.scratch=PATH")


def _make_room(folder: Path, allowed_bytes: float) -> None:
    """Delete the least recently used entries until the rest is within ``allowed_bytes``.

    A worker that still reads a deleted entry keeps its mapping until it ends. Partial entries of killed workers are deleted
    first; entries that another worker is writing now count towards the size and stay.
    """
    total_bytes, entries = 0, []
    for values in folder.glob("*/values.npy"):
        if not values.parent.name.startswith("."):
            entries.append((values.parent.stat().st_mtime, values.stat().st_size, values.parent))
        elif is_being_created(values.parent):
            total_bytes += values.stat().st_size
        else:
            shutil.rmtree(values.parent, ignore_errors=True)
    total_bytes += sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if total_bytes <= allowed_bytes:
            break
        shutil.rmtree(entry, ignore_errors=True)
        total_bytes -= size
    if total_bytes > allowed_bytes:
        raise NotStored("other workers are filling launcher.activation_cache_gb at this moment")


def _reserve(path: Path, shape: tuple[int, int], dtype: np.dtype[Any], needed_bytes: int) -> np.memmap:
    """A file with its disk space allocated up front: writing to a memory map on a full disk would kill the process."""
    free = shutil.disk_usage(path.parent).free
    if free < needed_bytes + SPARE_BYTES:
        raise OSError(errno.ENOSPC, f"{needed_bytes / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free", str(path))
    values = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return values


def lowest_hook_point(layers: nn.ModuleList) -> int:
    """Index of the lowest decoder layer whose output an adapter changes, or above which one changes weights."""
    return next(i for i, layer in enumerate(layers) if isinstance(layer, (IsaerftLayer, FrozenBoundary)))


def layer_at_hook_point(layers: nn.ModuleList, hook_layer: int) -> IsaerftLayer | FrozenBoundary:
    """The wrapped decoder layer at ``hook_layer``."""
    return cast("IsaerftLayer | FrozenBoundary", layers[hook_layer])


def _weights_digest(model: peft.PeftModel, layers: nn.ModuleList, hook_layer: int) -> str:
    """A hash of the config and a sample of every frozen weight: the same name may stand for different weights."""
    base = model.get_base_model()
    digest = hashlib.sha256(base.config.to_json_string().encode())
    for module in (base.get_input_embeddings(), *layers[: hook_layer + 1]):
        for parameter in module.parameters():
            if not parameter.requires_grad:
                digest.update(
                    parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].float().cpu().numpy().tobytes()
                )
    return digest.hexdigest()[:20]


@torch.no_grad()
def _compute(
    base: PreTrainedModel,
    layer: nn.Module,
    sequences: list[list[int]],
    share: bool,
    values: np.memmap,
    report: Callable[[float], None],
) -> None:
    base.eval()  # without dropout: every trial reads these values
    starts = list(accumulate(map(len, sequences), initial=0))
    done, logged_s = 0, time.monotonic()
    for number, stream in streams_of(base, layer, sequences, share):
        kept = stream.contiguous().cpu()
        values[starts[number] : starts[number + 1]] = (
            kept.view(torch.uint16) if kept.dtype == torch.bfloat16 else kept
        ).numpy()
        done += len(kept)
        report(done / len(values))
        if time.monotonic() - logged_s > LOG_INTERVAL_S:
            logged_s = time.monotonic()
            print(f"frozen layers' output: {done} of {len(values)} tokens", flush=True)
    values.flush()


def _digest(values: np.ndarray) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(values), 4096):
        digest.update(values[start : start + 4096].tobytes())
    return digest.hexdigest()


def _open(entry: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The values of an entry, or None when the file is missing or damaged."""
    try:
        values = np.load(entry / "values.npy", mmap_mode="r")
    except (OSError, ValueError):
        return None  # another worker deleted it, or it is damaged
    intact = values.shape == shape and (read_json(entry / "digest.json") or {}).get("sha256") == _digest(values)
    return values if intact else None


def places_of(sequences: list[list[int]]) -> dict[str, tuple[int, int]]:
    """(start, length) of each sequence's values, by its hash."""
    places, start = {}, 0
    for sequence in sequences:
        places[sequence_key(sequence)] = (start, len(sequence))
        start += len(sequence)
    return places
