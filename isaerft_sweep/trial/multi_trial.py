"""Several trials' batches through one model in one pass, each with its own adapter.

The rows of all trials lie one below the other. The frozen layers up to the site run once for sequences that several trials
have in common (or not at all, where their output is stored); above the site every trial's rows get its own block's change
at its own sites, and everything frozen, head included, runs over all rows at once. Larger matrices are what makes it faster,
on devices that a single small batch leaves idle.
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
from isaerft_sweep.trial.activation_cache import sequence_key
from isaerft_sweep.trial.batch_layout import Batch, TokenLogps
from isaerft_sweep.trial.frozen_prefix import stream_of
from isaerft_sweep.trial.passes import ForwardPass
from isaerft_sweep.trial.strategy import make_layout, token_numbers
from isaerft_sweep.trial.upper_layers import Inject, stand_ins

WORTHWHILE_RATIO = 0.95
"""A larger pack must take less than this share of the time per trial to be worth it."""
LARGEST_PASS = 16


class MultiTrialModel:
    """A model that runs parts of several trials at once; the trials' sites must begin at the same layer."""

    def __init__(self, model: PreTrainedModel, site: int) -> None:
        self.base, self.site = model, site
        self._inject: Inject
        self._present: list[tuple[nn.ModuleList, slice]] = []
        """The layers of each trial in the present call of the decoder, and its rows."""

    @cached_property
    def _model(self) -> PreTrainedModel:
        """The model that all rows go through: made when two trials first go together, which most workers' never do."""
        model = sharing_weights(self.base)
        layers = decoder_layers(model)
        below, self._inject = stand_ins(self.base, self.site)
        for i in range(self.site):
            layers[i] = below[i]
        layers[self.site] = self._inject
        for i in range(self.site, len(layers)):
            layers[i].register_forward_hook(partial(self._add_changes, i))
        return model

    def forward(self, parts: Sequence[ForwardPass]) -> list[TokenLogps]:
        """For every part what ``ForwardPass.run`` gives."""
        if len(parts) == 1:
            return [parts[0].run()]
        batch = _joined([part.batch for part in parts])
        layout = make_layout(batch, parts[0].strategy.share_prompts)
        hidden = layout.arranged(self._at_site(parts, batch), batch.mask)
        owner = torch.empty(len(layout.ids), dtype=torch.long)
        owner[layout.row[:, 0].cpu()] = torch.tensor([n for n, part in enumerate(parts) for _ in part.batch.ids])
        layers = [decoder_layers(part.model) for part in parts]

        def prepare(rows: list[int], width: int) -> None:
            self._inject.hidden = hidden[rows, :width]
            present = owner[rows].tolist()  # rows are in order, so every trial's are neighbours
            starts = [i for i in range(len(rows)) if i == 0 or present[i] != present[i - 1]]
            ends = [*starts[1:], len(rows)]
            self._present = [(layers[present[a]], slice(a, b)) for a, b in zip(starts, ends, strict=True)]

        logps, means = token_numbers(self._model, batch, layout, prepare)
        counts = [int(part.batch.read.sum()) for part in parts]
        return list(map(TokenLogps, logps.split(counts), means.split(counts)))

    def _at_site(self, parts: Sequence[ForwardPass], batch: Batch) -> torch.Tensor:
        """What the site's own layer gives out for all rows [row, position, hidden]: stored, or computed once a sequence."""
        keys = [sequence_key(ids[kept].tolist()) for ids, kept in zip(batch.ids.cpu(), batch.mask.cpu().bool(), strict=True)]
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        rows = sorted(first.values())
        ids, mask = batch.ids[rows], batch.mask[rows]
        above = parts[0].strategy.above
        stream = above.hidden(ids, mask) if above else stream_of(self.base, decoder_layers(self.base)[self.site], ids, mask)
        place = {row: i for i, row in enumerate(rows)}
        return stream[[place[first[key]] for key in keys]]

    def _add_changes(self, number: int, _layer: nn.Module, _args: Any, output: Any) -> Any:
        """A hook on every layer from the site on: the trials' own changes of their rows."""
        x = output[0] if isinstance(output, tuple) else output
        owned = [(layers[number], rows) for layers, rows in self._present]
        if not any(isinstance(layer, IsaerftLayer) for layer, _ in owned):
            return None
        x = torch.cat([layer.changed(x[rows]) if isinstance(layer, IsaerftLayer) else x[rows] for layer, rows in owned])
        return (x, *output[1:]) if isinstance(output, tuple) else x


def set_gradients_aside(model: PreTrainedModel) -> list[tuple[nn.Parameter, torch.Tensor | None]]:
    """Take the gradients of earlier passes off the trained parameters: a measured or failed pass would add to them."""
    gradients = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    for parameter, _ in gradients:
        parameter.grad = None
    return gradients


def measure_trials_per_pass(
    joint: MultiTrialModel, part: ForwardPass, largest: int = LARGEST_PASS
) -> tuple[int, dict[int, float], tuple[int, str] | None]:
    """How many trials should go together on this device, and seconds per trial and step for each number tried.

    Tries 1, 2, 4 … copies of ``part``, forward and backward, until one more doubling does not pay or fails, for want of
    memory mostly; then the third is the number that failed and why. An error of the trial's own will meet it again.
    """
    before = set_gradients_aside(part.model)
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
    for parameter, gradient in before:
        parameter.grad = gradient
    return best, seconds, failed


def _step_seconds(joint: MultiTrialModel, parts: list[ForwardPass]) -> float:
    _synchronize()
    started = time.perf_counter()
    torch.autograd.backward([numbers.logps.sum() for numbers in joint.forward(parts)])
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _joined(batches: Sequence[Batch]) -> Batch:
    """All rows, padded to the longest."""
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
