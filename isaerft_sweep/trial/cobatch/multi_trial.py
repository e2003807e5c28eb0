"""Runs co-batched trials: several trials' batches in one pass through one model, each with its own adapter.

The rows of all trials are concatenated. The frozen layers up to the hook point run once per distinct sequence, or not at all
if their output is cached. Above it, each trial's adapter changes that trial's rows at its own hook points, and all frozen
parts, head included, run over all rows at once. Larger matrices make this faster on devices that one small batch underuses.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.adapter.layer import IsaerftLayer
from isaerft_sweep.models.loading import sharing_weights
from isaerft_sweep.trial.cobatch.passes import ForwardPass
from isaerft_sweep.trial.forward.activation_cache import sequence_key
from isaerft_sweep.trial.forward.batch_layout import Batch, TokenLogps
from isaerft_sweep.trial.forward.frozen_prefix import stream_of
from isaerft_sweep.trial.forward.strategy import make_layout, read_logps
from isaerft_sweep.trial.forward.upper_layers import CachedLayer, replacement_layers

WORTHWHILE_RATIO = 0.95
"""Doubling the trials per pass is worth it if the time per trial falls below this fraction."""
LARGEST_PASS = 16


class MultiTrialModel:
    """A model that runs co-batched trials, whose lowest hook points must be the same layer."""

    def __init__(self, model: PreTrainedModel, hook_layer: int) -> None:
        """``model``: without an adapter. ``hook_layer``: index of the lowest layer with an adapter."""
        self.base, self.hook_layer = model, hook_layer
        self._cached_layer: CachedLayer
        self._layers_and_rows: list[tuple[nn.ModuleList, slice]] = []
        """Each trial's layers and its rows in the current call of the decoder."""

    @cached_property
    def _model(self) -> PreTrainedModel:
        """The model that runs all rows; created when trials are first co-batched, which never happens in most workers."""
        model = sharing_weights(self.base)
        layers = decoder_layers(model)
        below, self._cached_layer = replacement_layers(self.base, self.hook_layer)
        for i in range(self.hook_layer):
            layers[i] = below[i]
        layers[self.hook_layer] = self._cached_layer
        for i in range(self.hook_layer, len(layers)):
            layers[i].register_forward_hook(partial(self._add_changes, i))
        return model

    def forward(self, parts: Sequence[ForwardPass]) -> list[TokenLogps]:
        """The result of ``ForwardPass.run`` for each part."""
        if len(parts) == 1:
            return [parts[0].run()]
        batch = _joined([part.batch for part in parts])
        layout = make_layout(batch, parts[0].strategy.share_prompts)
        hidden = layout.arranged(self._frozen_output(parts, batch), batch.mask)
        owner = torch.empty(len(layout.ids), dtype=torch.long)
        owner[layout.row[:, 0].cpu()] = torch.tensor([n for n, part in enumerate(parts) for _ in part.batch.ids])
        layers = [decoder_layers(part.model) for part in parts]

        def prepare(rows: list[int], width: int) -> None:
            self._cached_layer.set_hidden(hidden[rows, :width])
            owners = owner[rows].tolist()  # rows are ordered by trial, so each trial's are contiguous
            starts = [i for i in range(len(rows)) if i == 0 or owners[i] != owners[i - 1]]
            ends = [*starts[1:], len(rows)]
            self._layers_and_rows = [(layers[owners[a]], slice(a, b)) for a, b in zip(starts, ends, strict=True)]

        logps, means = read_logps(self._model, batch, layout, prepare)
        counts = [int(part.batch.read.sum()) for part in parts]
        return list(map(TokenLogps, logps.split(counts), means.split(counts)))

    def _frozen_output(self, parts: Sequence[ForwardPass], batch: Batch) -> torch.Tensor:
        """Output of the hook point's layer [row, position, hidden]: cached, or computed once per distinct sequence."""
        keys = [sequence_key(ids[kept].tolist()) for ids, kept in zip(batch.ids.cpu(), batch.mask.cpu().bool(), strict=True)]
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        rows = sorted(first.values())
        ids, mask = batch.ids[rows], batch.mask[rows]
        above = parts[0].strategy.above
        layer = decoder_layers(self.base)[self.hook_layer]
        stream = above.hidden(ids, mask) if above else stream_of(self.base, layer, ids, mask)
        index = {row: i for i, row in enumerate(rows)}
        return stream[[index[first[key]] for key in keys]]

    def _add_changes(self, number: int, _layer: nn.Module, _args: Any, output: Any) -> Any:
        """Forward hook on every layer from the hook point on: each trial's adapter changes that trial's rows."""
        x = output[0] if isinstance(output, tuple) else output
        owned = [(layers[number], rows) for layers, rows in self._layers_and_rows]
        if not any(isinstance(layer, IsaerftLayer) for layer, _ in owned):
            return None
        x = torch.cat([layer.changed(x[rows]) if isinstance(layer, IsaerftLayer) else x[rows] for layer, rows in owned])
        return (x, *output[1:]) if isinstance(output, tuple) else x


def set_gradients_aside(model: PreTrainedModel) -> list[tuple[nn.Parameter, torch.Tensor | None]]:
    """Remove and return the gradients of the trained parameters: a measured or failed pass would add to them."""
    gradients = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    for parameter, _ in gradients:
        parameter.grad = None
    return gradients


def measure_trials_per_pass(
    joint: MultiTrialModel, part: ForwardPass, largest: int = LARGEST_PASS
) -> tuple[int, dict[int, float], tuple[int, str] | None]:
    """The fastest number of trials per pass; seconds per trial and step by number; the number that failed, with its error.

    Tries 1, 2, 4 … copies of ``part``, forward and backward, until doubling no longer pays or fails, mostly for lack of
    memory. An error of the trial itself recurs when its pass runs.
    """
    earlier = set_gradients_aside(part.model)
    seconds: dict[int, float] = {}
    number, best, failed = 1, 1, None
    while number <= largest:
        try:
            seconds[number] = min(_step_seconds(joint, [part] * number) for _ in range(2)) / number
        except Exception as error:
            failed = number, str(error)[:300]
            break
        if number > 1 and seconds[number] > WORTHWHILE_RATIO * seconds[best]:
            break
        number, best = number * 2, number
    for parameter, gradient in earlier:
        parameter.grad = gradient
    return best, seconds, failed


def _step_seconds(joint: MultiTrialModel, parts: list[ForwardPass]) -> float:
    _synchronize()
    started = time.perf_counter()
    torch.autograd.backward([outputs.logps.sum() for outputs in joint.forward(parts)])
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _joined(batches: Sequence[Batch]) -> Batch:
    """One batch with all rows, padded to the longest."""
    width = max(batch.ids.shape[1] for batch in batches)

    def padded(tensor: torch.Tensor, to: int) -> torch.Tensor:
        return nn.functional.pad(tensor, (0, to - tensor.shape[1]))

    starts = list(accumulate((len(batch.ids) for batch in batches), initial=0))
    return Batch(
        torch.cat([padded(batch.ids, width) for batch in batches]),
        torch.cat([padded(batch.mask, width) for batch in batches]),
        torch.cat([padded(batch.read, width - 1) for batch in batches]),
        tuple((start + a, start + b) for start, batch in zip(starts, batches, strict=False) for a, b in batch.pairs),
        tuple(starts[: len(batches)]),
    )
