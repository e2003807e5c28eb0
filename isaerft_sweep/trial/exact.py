"""Chooses the optimisations that are exact for a model, by trying them on a few tokens before training.

Families differ in what their layers accept and return; some cannot be cut at a hook point or run without their own head.
Log-probabilities and gradients are compared with the plain model and a forward hook written from the formula. An inexact
optimisation is switched off; a model that fails even without any is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from torch import nn
from transformers import PreTrainedModel

from isaerft_sweep.adapter import IsaerftConfig
from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.adapter.layer import IsaerftLayer
from isaerft_sweep.adapter.sae import first_line
from isaerft_sweep.errors import ModelError
from isaerft_sweep.models.loading import sharing_weights
from isaerft_sweep.trial.forward.activation_cache import StoredActivations, layer_at_hook_point, lowest_hook_point, places_of
from isaerft_sweep.trial.forward.batch_layout import Batch
from isaerft_sweep.trial.forward.frozen_prefix import streams_of
from isaerft_sweep.trial.forward.strategy import ForwardStrategy, plain_logps, small_batch
from isaerft_sweep.trial.forward.upper_layers import UpperLayers

LOGP_BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
GRADIENT_BOUNDS = {torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 2.5e-1}
"""Largest relative error of log-probabilities and gradients, by the model's dtype."""
BIAS_STD = 0.1
"""Standard deviation of the probe adapter's bias: large enough to change the outputs."""


class ProbeResult(NamedTuple):
    """Both float32. ``logps``: of the read tokens [n]; ``gradient``: of their sum, by all biases [hook points · d_sae]."""

    logps: torch.Tensor
    gradient: torch.Tensor


@dataclass(frozen=True)
class Optimizations:
    """Which optimisations are on.

    ``cached_activations``: cached output replaces the layers up to the hook point. ``share_prompts``: both answers of a pair
    follow one prompt (needs ``lean_logits``). ``lean_logits``: logits only where the loss reads them.
    """

    cached_activations: bool = False
    share_prompts: bool = False
    lean_logits: bool = False

    def within(self, others: Optimizations) -> bool:
        """Whether none is on that is off in ``others``."""
        return all(getattr(others, name) or not is_on for name, is_on in vars(self).items())


PLAIN = Optimizations()
BY_SAVING = (
    Optimizations(True, True, True),
    Optimizations(True, False, True),
    Optimizations(False, True, True),
    Optimizations(False, False, True),
    Optimizations(cached_activations=True),
    PLAIN,
)
"""Ordered by how much they save, most first."""


def find_exact(
    model: PreTrainedModel, sites: Sequence[Mapping[str, Any]], wanted: Optimizations
) -> tuple[Optimizations, str]:
    """The exact optimisations that save most within ``wanted``, and the reason if it is not all of ``wanted``.

    ``model``: as loaded, without an adapter. Raises ModelError when no adapter can be trained on it. The random state is
    restored afterwards, so a trial's random numbers do not depend on this check.
    """
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        return _find_exact(model, sites, wanted)


def _find_exact(
    model: PreTrainedModel, sites: Sequence[Mapping[str, Any]], wanted: Optimizations
) -> tuple[Optimizations, str]:
    reasons: list[str] = []
    if getattr(model.config, "output_router_logits", False):
        wanted, reasons = PLAIN, ["its config has output_router_logits=true, and that loss reads every layer"]
    probe = _Probe(model, sites)
    random_state = torch.get_rng_state(), _device_state(model)
    expected = probe.expected()
    if not all(map(torch.equal, random_state, (torch.get_rng_state(), _device_state(model)))):
        # routers that add noise: a trial could not be repeated, nor resumed with the same numbers
        raise _refused(model, "its layers draw random numbers while it trains; if its config can switch that off, do")
    for optimizations in BY_SAVING:
        if not optimizations.within(wanted):
            continue
        try:
            reason = _difference(probe.result(optimizations), expected, probe.dtype)
        except Exception as error:  # families raise different types
            if optimizations == PLAIN:
                raise _refused(model, first_line(error)) from error
            reason = f"{type(error).__name__}: {first_line(error)[:100]}"
        if reason is None:
            return optimizations, reasons[0] if reasons else ""
        reasons.append(reason)
    raise _refused(model, f"with the adapter {reasons[-1]}")


def _device_state(model: PreTrainedModel) -> torch.Tensor:
    """The random state of the model's GPU; empty on a CPU."""
    return torch.cuda.get_rng_state(model.device) if model.device.type == "cuda" else torch.empty(0)


def _refused(model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(
        f"the model must be one whose decoder layers pass on a residual stream that an adapter can be trained on, but a "
        f"step of {type(model).__name__} with one failed: {reason.rstrip('.')}. Choose another model: model.name=NAME."
    )


def _difference(actual: ProbeResult, expected: ProbeResult, dtype: torch.dtype) -> str | None:
    """The relative error in words if it is too large for a model of ``dtype``, else None."""
    names, bounds_of = ("log-probabilities", "gradients"), (LOGP_BOUNDS, GRADIENT_BOUNDS)
    for name, value, plain, bounds in zip(names, actual, expected, bounds_of, strict=True):
        error = float((value - plain).norm() / plain.norm())
        if not error <= bounds.get(dtype, 1e-4):  # also for NaN
            return f"its {name} would change by {error:.1g} of their size"
    return None


class _Probe:
    """A small batch, and a bias adapter with random values at the hook points."""

    def __init__(self, model: PreTrainedModel, sites: Sequence[Mapping[str, Any]]) -> None:
        self.model, self.sites, self.dtype = model, sites, next(model.parameters()).dtype
        ids, mask = small_batch(model.config.get_text_config().vocab_size, model.device)
        self.batch = Batch(ids, mask, mask[:, 1:].bool(), ((0, 2), (1, 3)))
        generator = torch.Generator().manual_seed(1)
        self.adapted = self._with_adapter()
        layers = decoder_layers(self.adapted.get_base_model())
        self.biases = [_bias(layer) for layer in layers if isinstance(layer, IsaerftLayer)]
        for bias in self.biases:
            bias.data = (BIAS_STD * torch.randn(bias.shape, generator=generator)).to(bias)

    def _with_adapter(self) -> peft.PeftModel:
        sites = [{key: value for key, value in hook_point.items() if value is not None} for hook_point in self.sites]
        # where the adapter needs no SAE, none is loaded
        has_saes = all("sae_path" in hook_point or "sae_release" in hook_point for hook_point in sites)
        config = IsaerftConfig(sites=sites, kind="bias" if has_saes else "vector")
        with torch.random.fork_rng(devices=[]):
            return peft.get_peft_model(sharing_weights(self.model), config).train()

    def expected(self) -> ProbeResult:
        """The result of the plain model with x + b @ W_dec added by a forward hook at each hook point."""
        plain = sharing_weights(self.model).train()
        layers, adapted_layers = decoder_layers(plain), decoder_layers(self.adapted.get_base_model())
        with ExitStack() as stack:
            for index, layer in enumerate(adapted_layers):
                if isinstance(layer, IsaerftLayer):
                    stack.callback(layers[index].register_forward_hook(_adding(layer, index)).remove)
            try:
                return self._read(lambda: plain_logps(plain, self.batch).logps)
            except Exception as error:
                raise _refused(self.model, first_line(error)) from error

    def result(self, used: Optimizations) -> ProbeResult:
        """The result with these optimisations."""
        base: Any = self.adapted.get_base_model()
        with (
            UpperLayers(self.adapted, self._stored(used.share_prompts)).replaced()
            if used.cached_activations
            else nullcontext() as above
        ):
            strategy = ForwardStrategy(above, used.share_prompts, used.lean_logits)
            return self._read(lambda: strategy.forward(base, self.batch).logps)

    def _read(self, forward: Callable[[], torch.Tensor]) -> ProbeResult:
        for bias in self.biases:
            bias.grad = None
        logps = forward()
        logps.sum().backward()
        gradients = [bias.grad for bias in self.biases if bias.grad is not None]
        if len(gradients) < len(self.biases):
            raise ValueError("no gradient reaches the adapter")
        return ProbeResult(logps.detach().float(), torch.cat([gradient.flatten().float() for gradient in gradients]))

    def _stored(self, share: bool) -> StoredActivations:
        base: Any = self.adapted.get_base_model()
        layers = decoder_layers(base)
        sequences = [ids[kept.bool()].tolist() for ids, kept in zip(self.batch.ids, self.batch.mask, strict=True)]
        streams = dict(streams_of(base, layer_at_hook_point(layers, lowest_hook_point(layers)).base_layer, sequences, share))
        values = torch.cat([streams[number] for number in range(len(sequences))]).cpu().contiguous()
        stored = values.view(torch.uint16) if values.dtype == torch.bfloat16 else values
        return StoredActivations(np.asarray(stored.numpy()), places_of(sequences), values.dtype)


def _bias(layer: IsaerftLayer) -> nn.Parameter:
    bias: Any = layer.isaerft_block["default"].bias
    return bias  # type: ignore[no-any-return]


def _adding(layer: IsaerftLayer, index: int) -> Callable[..., Any]:
    """A forward hook that adds b @ W_dec to the output of the plain layer."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        if not isinstance(x, torch.Tensor) or x.dim() != 3:
            shape = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"decoder layer {index} returns {shape} and not [batch, position, hidden]")
        vector = _bias(layer) @ layer.decoder("default")
        changed = x + vector.to(x.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
