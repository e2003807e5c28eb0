"""One hook point: a decoder layer whose output passes through the SAE's latents and the trainable block."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from isaerft_sweep.adapter.blocks import make_block
from isaerft_sweep.adapter.config import IsaerftConfig
from isaerft_sweep.adapter.sae import FrozenSae
from isaerft_sweep.adapter.wrapped_layer import WrappedLayer
from isaerft_sweep.errors import ModelError


class IsaerftLayer(WrappedLayer, BaseTunerLayer):
    """Wraps a decoder layer with output x: x + decode(f + Δf) − decode(f), f = encode(x), Δf the block's change.

    The decoder is affine, so this is x + Δf @ W_dec: the SAE's reconstruction error cancels exactly, and the bias (Δf = b)
    needs no encoding. The change is computed in float32 and rounded once, to x's dtype.
    """

    adapter_layer_names = ("isaerft_block",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: IsaerftConfig, sae: FrozenSae) -> None:
        super().__init__(base_layer)
        self.isaerft_block = nn.ModuleDict()
        # a plain dict, not a ModuleDict: the SAE is neither trained nor saved with the adapter
        self.saes: dict[str, FrozenSae] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, sae)

    def update_layer(self, adapter_name: str, config: IsaerftConfig, sae: FrozenSae) -> None:
        """Add the block of another adapter."""
        self.saes[adapter_name] = sae
        self.isaerft_block[adapter_name] = make_block(config, sae.d_sae)
        # float32 for any dtype of the model: the change is rounded once, and Adam needs the precision
        self.isaerft_block[adapter_name].to(next(self.base_layer.parameters()).device)
        self.register_buffer(f"decoder_{adapter_name}", sae.decoder, persistent=False)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def decoder(self, adapter_name: str) -> torch.Tensor:
        """The SAE's decoder, [d_sae, d_in], float32, on the block's device."""
        decoder: torch.Tensor = getattr(self, f"decoder_{adapter_name}")
        device = next(self.isaerft_block[adapter_name].parameters()).device
        if decoder.device != device or decoder.dtype != torch.float32:  # after model.to(device) or model.to(dtype)
            decoder = self.saes[adapter_name].decoder.to(device)
            setattr(self, f"decoder_{adapter_name}", decoder)
        return decoder

    def change(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the residual stream x [batch, position, d_in]; float32, [d_in] for the bias."""
        block, decoder = self.isaerft_block[adapter_name], self.decoder(adapter_name)
        with torch.autocast(device_type=x.device.type, enabled=False):
            latents = self.saes[adapter_name].encode(x.float()) if block.needs_latents else None
            if latents is not None:
                latents = latents.to(next(block.parameters()).dtype)  # after model.to(dtype)
            change: torch.Tensor = block(latents).float()
            return change if self.saes[adapter_name].basis == "stream" else change @ decoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output with the active adapters' changes; in a tuple, the first element changes."""
        output = self.base_layer(*args, **kwargs)
        if isinstance(output, tuple):
            return (self.changed(output[0]), *output[1:])
        return self.changed(output)

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream x [batch, position, d_in] with the active adapters' changes."""
        if self.disable_adapters or self.merged:
            return x
        for name in self.active_adapters:
            if name in self.isaerft_block:
                x = x + self.change(name, x).to(x.dtype)
        return x

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the bias adapters' constant b @ W_dec to the last linear map of the layer. See ``merge.py``."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.isaerft_block:
                self._add_constant(name, +1)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract every merged constant."""
        while self.merged_adapters:
            self._add_constant(self.merged_adapters.pop(), -1)

    @torch.no_grad()
    def _add_constant(self, adapter_name: str, sign: int) -> None:
        from isaerft_sweep.adapter.merge import last_linear

        bias = last_linear(self.base_layer).bias
        if bias is None:
            raise ModelError("the layer's last linear map must have a bias to merge into; call merge_adapter on the model.")
        bias += (sign * (self.isaerft_block[adapter_name]().float() @ self.decoder(adapter_name))).to(bias.dtype)
