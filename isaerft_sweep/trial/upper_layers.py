"""A model that runs only what is above the lowest site: the layers up to it hand out their stored output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import peft
import torch
from torch import nn
from transformers import PreTrainedModel

from isaerft_sweep.adapter.architecture import decoder_layers, decoder_name
from isaerft_sweep.models.loading import sharing_weights
from isaerft_sweep.trial.activation_cache import StoredActivations, layer_at_hook_point, lowest_hook_point
from isaerft_sweep.trial.frozen_prefix import Reached, stream_of

Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From ids and mask [sequence, position] to the residual stream [sequence, position, hidden]."""


class _StandsIn(nn.Module):
    """A layer in the place of another, whose attributes it has: decoders ask their layers of which kind they are."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        """``outputs``: how many things the layer gives out in a tuple; 0: its states alone."""
        super().__init__()
        self.__dict__["stood_in_for"] = layer  # not a module of this one: its weights are not to be run, moved or saved
        self._outputs = outputs

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stood_in_for"], name)

    def _given(self, states: torch.Tensor) -> Any:
        return (states, *[None] * (self._outputs - 1)) if self._outputs else states


class IdentityLayer(_StandsIn):
    """A layer below the site: gives back what it got."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._given(hidden_states)


class Inject(_StandsIn):
    """The site's own layer: gives out the stored residual stream [row, position, hidden] of the present call."""

    hidden: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.hidden is not None
        return self._given(self.hidden)


def stand_ins(model: PreTrainedModel, site: int) -> tuple[list[IdentityLayer], Inject]:
    """What takes the places of the layers below ``site`` and of the site's own, for a model without an adapter."""
    layers, outputs = decoder_layers(model), dict[int, int]()

    def note(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[index] = len(output) if isinstance(output, tuple) else 0
            if index == site:
                raise Reached

        return hook

    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with ExitStack() as stack, torch.no_grad():
        for index in range(site + 1):
            stack.callback(layers[index].register_forward_hook(note(index)).remove)
        with suppress(Reached):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return [IdentityLayer(layers[i], outputs[i]) for i in range(site)], Inject(layers[site], outputs[site])


class UpperLayers:
    """What hands out stored values in the place of the layers up to the site."""

    def __init__(self, stored: StoredActivations, inject: Inject, device: torch.device, compute: Compute) -> None:
        """``inject`` stands at the site; ``compute`` gives what is not stored."""
        self.stored, self.device, self.inject, self._compute = stored, device, inject, compute
        self.computed = 0
        """Batches that held a sequence which is not stored."""
        self._given: torch.Tensor | None = None

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The residual stream [sequence, position, hidden] for ids and mask [sequence, position]."""
        found = self.stored.batch(ids, mask, self.device)
        if found is None:
            self.computed += 1
            found = self._compute(ids, mask) * mask.unsqueeze(-1)
        return found

    def give(self, hidden: torch.Tensor) -> None:
        """What to hand out in the next call, in the order of its rows; without it the call's ids and mask decide."""
        self._given = hidden

    def before_call(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook on the decoder."""
        ids = args[0] if args else kwargs["input_ids"]
        given, self._given = self._given, None
        self.inject.hidden = self.hidden(ids, kwargs["attention_mask"]) if given is None else given


@contextmanager
def only_upper_layers(model: peft.PeftModel, stored: StoredActivations) -> Iterator[UpperLayers]:
    """While the block runs, the model's layers up to the site hand out stored values instead of computing them.

    The layers keep their places and names, so that saving and loading the adapter work meanwhile.
    """
    base = model.get_base_model()
    layers = decoder_layers(base)
    site = lowest_hook_point(layers)
    wrapped, below = layer_at_hook_point(layers, site), list(layers[:site])
    own = wrapped.base_layer
    whole = sharing_weights(base)
    passes, inject = stand_ins(whole, site)
    compute = partial(stream_of, whole, layer_at_hook_point(decoder_layers(whole), site).base_layer)
    above = UpperLayers(stored, inject, next(own.parameters()).device, compute)
    handle = getattr(base, decoder_name(base)).register_forward_pre_hook(above.before_call, with_kwargs=True)
    for i in range(site):
        layers[i] = passes[i]
    wrapped.base_layer = above.inject
    try:
        yield above
    finally:
        handle.remove()
        wrapped.base_layer = own
        for i, layer in enumerate(below):
            layers[i] = layer
