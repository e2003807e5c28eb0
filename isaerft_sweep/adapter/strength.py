"""Makes an adapter's change stronger or weaker, and switches single latents of it off or on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import peft
import torch
from torch import nn

from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.adapter.blocks import BiasBlock, FeedForwardBlock, LoreftBlock, ScaleBlock
from isaerft_sweep.adapter.layer import IsaerftLayer


@torch.no_grad()
def set_strength(model: peft.PeftModel, strength: float) -> None:
    """Multiply what the adapter changes by ``strength``, in its own weights: 0 is the base model, 1 leaves it as it is.

    For LoReFT W becomes R + strength · (W − R), for LoRA B becomes strength · B.
    """
    for module in model.modules():
        if isinstance(module, (BiasBlock, ScaleBlock)):
            next(iter(module.parameters())).mul_(strength)
        elif isinstance(module, FeedForwardBlock):
            for name in ("weight", "bias"):
                getattr(module, f"{name}_{module.maps - 1}").mul_(strength)
        elif isinstance(module, LoreftBlock):
            rows = module.rows()
            module.weight.copy_(rows + strength * (module.weight - rows))
            module.bias.mul_(strength)
        elif isinstance(module, peft.tuners.lora.LoraLayer):
            for b in module.lora_B.values():
                b.weight.mul_(strength)


@contextmanager
def changed(model: peft.PeftModel) -> Iterator[None]:
    """Inside the block the adapter's weights may be changed; then they are what they were."""
    before = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


@dataclass(frozen=True)
class Latent:
    """One latent of a bias or scale adapter: its hook point's layer, its number, and the adapter's parameters [d_sae]."""

    layer: int
    number: int
    parameter: nn.Parameter

    @property
    def value(self) -> float:
        return float(self.parameter.detach()[self.number])

    @torch.no_grad()
    def switch_off(self) -> None:
        """Leave the latent as it is without the adapter."""
        self.parameter[self.number] = 0.0

    @torch.no_grad()
    def keep_alone(self, others: list[nn.Parameter]) -> None:
        """Leave all other latents, those of ``others`` too, as they are without the adapter."""
        value = self.parameter[self.number].clone()
        for parameter in others:
            parameter.zero_()
        self.parameter[self.number] = value


def latent_parameters(model: peft.PeftModel) -> list[nn.Parameter]:
    """The adapter's parameters by latent, one tensor [d_sae] for each hook point; empty for other kinds."""
    return [parameter for _, parameter, _ in _on_latents(model)]


@torch.no_grad()
def largest_latents(model: peft.PeftModel, count: int) -> list[Latent]:
    """The ``count`` latents with the longest part in the change, |p_i| · ‖W_dec,i‖, longest first."""
    parts = [
        (float(length), layer, int(number), parameter)
        for layer, parameter, decoder in _on_latents(model)
        for length, number in zip(*(parameter.abs() * decoder.norm(dim=-1)).topk(min(count, len(parameter))), strict=True)
        if length > 0
    ]
    parts.sort(key=lambda part: -part[0])
    return [Latent(layer, number, parameter) for _, layer, number, parameter in parts[:count]]


def _on_latents(model: peft.PeftModel) -> Iterator[tuple[int, nn.Parameter, torch.Tensor]]:
    for index, layer in enumerate(decoder_layers(model.get_base_model())):
        if isinstance(layer, IsaerftLayer):
            name = layer.active_adapters[0]
            block = layer.isaerft_block[name]
            if layer.saes[name].basis == "sae" and isinstance(block, (BiasBlock, ScaleBlock)):
                yield index, next(iter(block.parameters())), layer.decoder(name)
