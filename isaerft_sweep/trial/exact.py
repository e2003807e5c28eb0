"""Which of the ways to save work give a model's own numbers: tried on a few tokens before anything is trained.

Families differ in what their layers take and give, and not every one can be cut at a site or run without its own head. What
a way gives is compared with the plain model and a forward hook written from the formula, gradients too. A way that is not
exact is not taken; a model that even the plain way does not fit is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

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
from isaerft_sweep.trial.activation_cache import StoredActivations, layer_at_hook_point, lowest_hook_point, places_of
from isaerft_sweep.trial.batch_layout import Batch
from isaerft_sweep.trial.frozen_prefix import streams_of
from isaerft_sweep.trial.strategy import make_layout, small_batch, token_numbers
from isaerft_sweep.trial.upper_layers import only_upper_layers

NUMBERS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
GRADIENTS = {torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 2.5e-1}
"""How far log-probabilities and gradients may be apart, relative to their size."""
SIZE = 0.1
"""Of the numbers that the adapter adds to the latents: enough to matter."""

Numbers = tuple[torch.Tensor, torch.Tensor]
"""Log-probabilities of the read tokens [n], and the gradient of their sum with respect to all biases [sites · d_sae]."""


@dataclass(frozen=True)
class Way:
    """``above``: stored output stands in for the layers up to the site; ``share``: a pair lies behind one prompt (lean
    only); ``lean``: logits only where the loss reads them, in place of the model's own forward pass."""

    above: bool = False
    share: bool = False
    lean: bool = False


PLAIN = Way()
WAYS = (
    Way(True, True, True),
    Way(True, False, True),
    Way(False, True, True),
    Way(False, False, True),
    Way(above=True),
    PLAIN,
)
"""From the one that saves most."""


def exact_way(model: PreTrainedModel, sites: Sequence[Mapping[str, Any]], wanted: Way) -> tuple[Way, str]:
    """The way that saves most of what is ``wanted`` with the model's own numbers, and why it is not all of it.

    ``model`` as it was loaded. Raises ModelError when no adapter can be trained on it. Random numbers that are drawn
    meanwhile are drawn again afterwards: a trial's own do not depend on whether it was checked.
    """
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        return _exact_way(model, sites, wanted)


def _exact_way(model: PreTrainedModel, sites: Sequence[Mapping[str, Any]], wanted: Way) -> tuple[Way, str]:
    reasons: list[str] = []
    if getattr(model.config, "output_router_logits", False):
        wanted, reasons = PLAIN, ["its config has output_router_logits=true, and that loss reads every layer"]
    probe = _Probe(model, sites)
    before = torch.get_rng_state(), _device_state(model)
    expected = probe.expected()
    if not all(map(torch.equal, before, (torch.get_rng_state(), _device_state(model)))):
        wanted, reasons = PLAIN, ["its layers draw random numbers while it trains"]  # routers that add noise
    for way in WAYS:
        if (way.above and not wanted.above) or (way.share and not wanted.share) or (way.lean and not wanted.lean):
            continue
        try:
            reason = _apart(probe.numbers(way), expected, probe.dtype)
        except Exception as error:  # every family may object in its own way
            if way == PLAIN:
                raise _refused(model, first_line(error)) from error
            reason = f"{type(error).__name__}: {first_line(error)[:100]}"
        if reason is None:
            return way, reasons[0] if reasons else ""
        reasons.append(reason)
    if reasons[0].endswith("while it trains"):
        return PLAIN, reasons[0]
    raise _refused(model, f"with the adapter {reasons[-1]}")


def _device_state(model: PreTrainedModel) -> torch.Tensor:
    """The state of the random numbers of the model's GPU; empty on a processor."""
    return torch.cuda.get_rng_state(model.device) if model.device.type == "cuda" else torch.empty(0)


def _refused(model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(
        f"the model must be one whose decoder layers hand on a residual stream that an adapter can be trained on, but a "
        f"step of {type(model).__name__} with one failed: {reason.rstrip('.')}. Choose another model: model.name=NAME."
    )


def _apart(found: Numbers, expected: Numbers, dtype: torch.dtype) -> str | None:
    """How far the numbers are apart, when that is too much for a model of ``dtype``."""
    for what, mine, plain, bounds in zip(
        ("log-probabilities", "gradients"), found, expected, (NUMBERS, GRADIENTS), strict=True
    ):
        apart = float((mine - plain).norm() / plain.norm())
        if not apart <= bounds.get(dtype, 1e-4):
            return f"its {what} would change by {apart:.1g} of their size"
    return None


class _Probe:
    """A small batch, and a bias adapter with numbers in it at the sites."""

    def __init__(self, model: PreTrainedModel, sites: Sequence[Mapping[str, Any]]) -> None:
        self.model, self.sites, self.dtype = model, sites, next(model.parameters()).dtype
        ids, mask = small_batch(model.config.get_text_config().vocab_size, model.device)
        self.batch = Batch(ids, mask, mask[:, 1:].bool(), ((0, 2), (1, 3)))
        generator = torch.Generator().manual_seed(1)
        self.adapted = self._with_adapter()
        layers = decoder_layers(self.adapted.get_base_model())
        self.biases = [_bias(layer) for layer in layers if isinstance(layer, IsaerftLayer)]
        for bias in self.biases:
            bias.data = (SIZE * torch.randn(bias.shape, generator=generator)).to(bias)

    def _with_adapter(self) -> peft.PeftModel:
        config = IsaerftConfig(sites=[{k: v for k, v in site.items() if v is not None} for site in self.sites], kind="bias")
        with torch.random.fork_rng(devices=[]):
            return peft.get_peft_model(sharing_weights(self.model), config).train()

    def expected(self) -> Numbers:
        """The plain model's, with x + b @ W_dec at each site by a forward hook."""
        plain = sharing_weights(self.model).train()
        layers, own = decoder_layers(plain), decoder_layers(self.adapted.get_base_model())
        with ExitStack() as stack:
            for index, layer in enumerate(own):
                if isinstance(layer, IsaerftLayer):
                    stack.callback(layers[index].register_forward_hook(_adding(layer, index)).remove)
            try:
                return self._read(lambda: self._logps(plain))
            except Exception as error:
                raise _refused(self.model, first_line(error)) from error

    def numbers(self, way: Way) -> Numbers:
        """Of one way."""
        base: Any = self.adapted.get_base_model()
        batch, layout = self.batch, make_layout(self.batch, way.share)
        if not way.above:
            return self._read(lambda: token_numbers(base, batch, layout)[0] if way.lean else self._logps(self.adapted))
        stored = self._stored(way.share)
        stream = stored.batch(batch.ids, batch.mask, batch.ids.device)
        assert stream is not None
        with only_upper_layers(self.adapted, stored) as above:
            if not way.lean:
                above.give(stream)
                return self._read(lambda: self._logps(self.adapted))
            rows_of = layout.arranged(stream, batch.mask)

            def prepare(rows: list[int], width: int) -> None:
                above.give(rows_of[rows, :width])

            return self._read(lambda: token_numbers(base, batch, layout, prepare)[0])

    def _read(self, forward: Callable[[], torch.Tensor]) -> Numbers:
        for bias in self.biases:
            bias.grad = None
        logps = forward()
        logps.sum().backward()
        gradients = [bias.grad for bias in self.biases if bias.grad is not None]
        if len(gradients) < len(self.biases):
            raise ValueError("no gradient reaches the adapter")
        return logps.detach().float(), torch.cat([gradient.flatten().float() for gradient in gradients])

    def _logps(self, model: Any) -> torch.Tensor:
        """log p of the read tokens by the model's own forward pass."""
        batch = self.batch
        logits = model(batch.ids, attention_mask=batch.mask, use_cache=False).logits.float()
        table = logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
        read: torch.Tensor = table[batch.read]
        return read

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
    """A forward hook on the plain layer: x + b @ W_dec."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        if not isinstance(x, torch.Tensor) or x.dim() != 3:
            shape = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"decoder layer {index} gives out {shape} and not [batch, position, hidden]")
        vector = _bias(layer) @ layer.decoder("default")
        changed = x + vector.to(x.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
