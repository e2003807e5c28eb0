"""The frozen layers up to the lowest site, run once: their output is the same in every trial and epoch of a sweep.

Kept as one memory-mapped file per (model, site, data), named by a hash of all of it, made by whoever comes first and
shared by every worker of the node. Training and evaluation then run only the layers above the site: in the model, the
layers below pass their input through, and the site's own layer hands out the stored output for the batch at hand, so
that transformers' code stays as it is.

Values are stored in the model's own dtype. They are computed in other batches than the trial's, so they may differ
in the last bits; positions of padding are zeros, which no loss reads.
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
from isaerft_sweep.adapter.layer import IsaerftLayer
from isaerft_sweep.journal.atomic_files import create_once, is_being_created, locked, read_json, write_json
from isaerft_sweep.spec_fields import canonical_json
from isaerft_sweep.specs import ModelSpec
from isaerft_sweep.trial.frozen_prefix import streams_of

SPARE_BYTES = 200e6
"""What a disk keeps free beside the stored output."""
_STORED: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype("float32"),
    torch.float16: np.dtype("float16"),
    torch.bfloat16: np.dtype("uint16"),
}


SAY_S = 20.0
"""Between two lines about how far it is."""


@dataclass(frozen=True)
class CachePlace:
    """A folder of stored activations, and how large all of them together may be."""

    folder: Path
    limit_gb: float


class NotStored(Exception):
    """Why the output is not kept: every trial computes it then."""


@dataclass(frozen=True)
class StoredActivations:
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
    """The different token sequences of tokenised pairs that the model will see, by length."""
    found = {tuple(row[f"{side}_ids"]) for data in datasets for row in data for side in ("chosen", "rejected")}
    return [list(s) for s in sorted(found, key=lambda s: (len(s), s))]


def stored_activations(
    model: peft.PeftModel,
    spec: ModelSpec,
    sequences: list[list[int]],
    place: CachePlace,
    share: bool,
    report: Callable[[float], None] = lambda _share: None,
) -> StoredActivations:
    """The frozen layers' output for ``sequences``, from the cache or computed and put there.

    Args:
        model: with the adapter on it.
        spec: the model's.
        sequences: token ids.
        place: where the cache is, and how large it may be.
        share: whether to compute what two sequences begin with once, where the model can (``why_not_shared``).
        report: called after every sequence with the share that is done.

    Raises NotStored when the output does not fit the limit or the disk, or the folder cannot be written.
    """
    folder, limit_gb = place.folder, place.limit_gb
    layers = decoder_layers(model.get_base_model())
    site = lowest_hook_point(layers)
    dtype, hidden = next(model.parameters()).dtype, model.get_input_embeddings().weight.shape[-1]
    shape = (sum(len(s) for s in sequences), hidden)
    needed_bytes = shape[0] * hidden * _STORED[dtype].itemsize
    if needed_bytes > limit_gb * 1e9:
        raise NotStored(f"{needed_bytes / 1e9:.3g} GB would not fit launcher.activation_cache_gb={limit_gb:g}")
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
        "shared prompts": share,
        "sequences": [sequence_key(s) for s in sequences],
    }
    name = hashlib.sha256(canonical_json(what).encode()).hexdigest()[:20]

    def make(aside: Path) -> None:
        with locked(folder / ".room"):
            _make_room(folder, limit_gb * 1e9 - needed_bytes)
            values = _reserve(aside / "values.npy", shape, _STORED[dtype], needed_bytes)
        _compute(model.get_base_model(), layer_at_hook_point(layers, site).base_layer, sequences, share, values, report)
        write_json(aside / "digest.json", {"sha256": _digest(values), "tokens": len(values)})

    try:
        for _ in range(2):
            entry = create_once(folder / name, make)
            values = _open(entry, shape)
            if values is not None:
                os.utime(entry)  # the least recently used goes first
                return StoredActivations(values, places_of(sequences), dtype)
            print(f"the stored activations in {entry} are damaged: made again", flush=True)
            shutil.rmtree(entry, ignore_errors=True)
    except OSError as error:
        raise NotStored(f"{folder} cannot be written ({error.strerror}); another place: launcher.scratch=PATH") from error
    raise NotStored(f"the disk of {folder} does not keep what is written to it; another place: launcher.scratch=PATH")


def _make_room(folder: Path, allowed_bytes: float) -> None:
    """Delete the least recently used entries until the rest is within ``allowed_bytes``.

    A worker that still reads a deleted entry keeps its mapping until it ends. What a worker left half made when it was
    killed goes first; what another makes at this moment counts and stays.
    """
    sizes, entries = 0, []
    for values in folder.glob("*/values.npy"):
        if not values.parent.name.startswith("."):
            entries.append((values.parent.stat().st_mtime, values.stat().st_size, values.parent))
        elif is_being_created(values.parent):
            sizes += values.stat().st_size
        else:
            shutil.rmtree(values.parent, ignore_errors=True)
    sizes += sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if sizes <= allowed_bytes:
            break
        shutil.rmtree(entry, ignore_errors=True)
        sizes -= size
    if sizes > allowed_bytes:
        raise NotStored("other workers are filling launcher.activation_cache_gb at this moment")


def _reserve(path: Path, shape: tuple[int, int], kind: np.dtype[Any], needed_bytes: int) -> np.memmap:
    """A file for the values, whose place on the disk is its own: a full disk would end a process that writes to a map."""
    free = shutil.disk_usage(path.parent).free
    if free < needed_bytes + SPARE_BYTES:
        raise OSError(errno.ENOSPC, f"{needed_bytes / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free", str(path))
    values = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return values


def lowest_hook_point(layers: nn.ModuleList) -> int:
    """Index of the lowest decoder layer that has an adapter."""
    return next(i for i, layer in enumerate(layers) if isinstance(layer, IsaerftLayer))


def layer_at_hook_point(layers: nn.ModuleList, site: int) -> IsaerftLayer:
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


@torch.no_grad()
def _compute(
    base: PreTrainedModel,
    layer: nn.Module,
    sequences: list[list[int]],
    share: bool,
    values: np.memmap,
    tell: Callable[[float], None],
) -> None:
    base.eval()  # what is stored must not hold anybody's dropout
    starts = list(accumulate(map(len, sequences), initial=0))
    done, said_s = 0, time.monotonic()
    for number, stream in streams_of(base, layer, sequences, share):
        kept = stream.contiguous().cpu()
        values[starts[number] : starts[number + 1]] = (
            kept.view(torch.uint16) if kept.dtype == torch.bfloat16 else kept
        ).numpy()
        done += len(kept)
        tell(done / len(values))
        if time.monotonic() - said_s > SAY_S:
            said_s = time.monotonic()
            print(f"frozen layers' output: {done} of {len(values)} tokens", flush=True)
    values.flush()


def _digest(values: np.ndarray) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(values), 4096):
        digest.update(values[start : start + 4096].tobytes())
    return digest.hexdigest()


def _open(entry: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The values of an entry, or None when they are not what was written."""
    try:
        values = np.load(entry / "values.npy", mmap_mode="r")
    except (OSError, ValueError):
        return None  # another worker has made room, or the file is not what was written
    whole = values.shape == shape and (read_json(entry / "digest.json") or {}).get("sha256") == _digest(values)
    return values if whole else None


def places_of(sequences: list[list[int]]) -> dict[str, tuple[int, int]]:
    """Where each sequence's values begin, and how many there are."""
    places, at = {}, 0
    for sequence in sequences:
        places[sequence_key(sequence)] = (at, len(sequence))
        at += len(sequence)
    return places
