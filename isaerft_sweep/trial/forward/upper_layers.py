"""A model that runs only the layers above the lowest hook point: the layers up to it return their cached output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import peft
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from isaerft_sweep.adapter.architecture import decoder_layers, decoder_name
from isaerft_sweep.models.loading import sharing_weights
from isaerft_sweep.trial.forward.activation_cache import StoredActivations, layer_at_hook_point, lowest_hook_point
from isaerft_sweep.trial.forward.frozen_prefix import Reached, stream_of

Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From ids and mask [sequence, position] to the residual stream [sequence, position, hidden]."""


class _ReplacementLayer(nn.Module):
    """Replaces a layer and has its attributes: decoders read, for instance, their layers' ``attention_type``."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        """``outputs``: length of the tuple that the layer returns; 0: it returns its states without a tuple."""
        super().__init__()
        self.__dict__["replaced"] = layer  # not a submodule: its weights must not be run, moved or saved
        self._outputs = outputs

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["replaced"], name)

    def _output(self, states: torch.Tensor) -> Any:
        return (states, *[None] * (self._outputs - 1)) if self._outputs else states


class IdentityLayer(_ReplacementLayer):
    """Replaces a layer below the hook point: returns its input."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._output(hidden_states)


class CachedLayer(_ReplacementLayer):
    """Replaces the layer at the hook point: returns the cached residual stream [row, position, hidden] of this call."""

    hidden: torch.Tensor | None = None

    def set_hidden(self, hidden: torch.Tensor) -> None:
        """The stream [row, position, hidden] that the next call returns."""
        self.hidden = hidden

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.hidden is not None
        return self._output(self.hidden)


def replacement_layers(model: PreTrainedModel, hook_layer: int) -> tuple[list[IdentityLayer], CachedLayer]:
    """Replacements of the layers below ``hook_layer`` and of that layer, for a model without an adapter."""
    layers, outputs = decoder_layers(model), dict[int, int]()

    def note(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[index] = len(output) if isinstance(output, tuple) else 0
            if index == hook_layer:
                raise Reached

        return hook

    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with ExitStack() as stack, torch.no_grad():
        for index in range(hook_layer + 1):
            stack.callback(layers[index].register_forward_hook(note(index)).remove)
        with suppress(Reached):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    below = [IdentityLayer(layers[i], outputs[i]) for i in range(hook_layer)]
    return below, CachedLayer(layers[hook_layer], outputs[hook_layer])


class UpperLayers:
    """Makes a model's layers up to the hook point return their cached output."""

    def __init__(self, model: peft.PeftModel, stored: StoredActivations) -> None:
        """``model``: with its adapter; nothing of it is replaced before ``replaced``."""
        base = model.get_base_model()
        self.stored, self._decoder, self._layers = stored, getattr(base, decoder_name(base)), decoder_layers(base)
        hook_layer = lowest_hook_point(self._layers)
        self._wrapped = layer_at_hook_point(self._layers, hook_layer)
        self._original_below, self._original_layer = list(self._layers[:hook_layer]), self._wrapped.base_layer
        self._device = next(self._original_layer.parameters()).device
        full_model = sharing_weights(base)
        self._identities, self._cached_layer = replacement_layers(full_model, hook_layer)
        self._compute: Compute = partial(
            stream_of, full_model, layer_at_hook_point(decoder_layers(full_model), hook_layer).base_layer
        )
        self._hook: RemovableHandle | None = None
        self.computed = 0
        """Number of batches that were not in the cache."""
        self._next_hidden: torch.Tensor | None = None

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The residual stream [sequence, position, hidden] for ids and mask [sequence, position]."""
        stream = self.stored.batch(ids, mask, self._device)
        if stream is None:
            self.computed += 1
            stream = self._compute(ids, mask) * mask.unsqueeze(-1)
        return stream

    def set_hidden(self, hidden: torch.Tensor) -> None:
        """Set the stream [row, position, hidden] of the next call; else the call's ids and mask determine it."""
        self._next_hidden = hidden

    @contextmanager
    def replaced(self) -> Iterator[UpperLayers]:
        """Inside the block, the layers up to the hook point return cached values instead of computing them.

        Positions and names of the layers stay, so saving and loading the adapter work inside the block.
        """
        self._replace()
        try:
            yield self
        finally:
            self._restore()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside the block, which is inside one of ``replaced``, the model computes all of its layers."""
        self._restore()
        try:
            yield
        finally:
            self._replace()

    def _replace(self) -> None:
        self._hook = self._decoder.register_forward_pre_hook(self._before_call, with_kwargs=True)
        self._put(self._identities, self._cached_layer)

    def _restore(self) -> None:
        assert self._hook is not None
        self._hook.remove()
        self._put(self._original_below, self._original_layer)

    def _put(self, below: Sequence[nn.Module], at_hook: nn.Module) -> None:
        for i, layer in enumerate(below):
            self._layers[i] = layer
        self._wrapped.base_layer = at_hook

    def _before_call(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook on the decoder."""
        ids = args[0] if args else kwargs["input_ids"]
        hidden, self._next_hidden = self._next_hidden, None
        self._cached_layer.set_hidden(self.hidden(ids, kwargs["attention_mask"]) if hidden is None else hidden)
