"""The trainable blocks: each maps latents f [..., d_sae] to the change Δf that it adds to them, zero at the start."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from isaerft_sweep.adapter.config import IsaerftConfig


class BiasBlock(nn.Module):
    """Δf = b, the same for every token; needs no latents."""

    needs_latents = False

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(d_sae))

    def forward(self, latents: torch.Tensor | None = None) -> torch.Tensor:
        """Δf of shape [d_sae]."""
        return self.bias


class ScaleBlock(nn.Module):
    """Δf = s · f, so that f becomes f · (1 + s) (as IA3, arXiv 2205.05638, with s = l − 1)."""

    needs_latents = True

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(d_sae))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Δf of the latents' shape."""
        return self.scale * latents


class LowRankLinear(nn.Module):
    """x ↦ B(Ax) + c with A [rank, d_in] and B [d_out, rank] (as LoRA, arXiv 2106.09685, without a frozen base)."""

    def __init__(self, d_in: int, d_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(d_in, rank, bias=False)
        self.up = nn.Linear(rank, d_out)

    @property
    def last(self) -> nn.Linear:
        """The map that must be zero for the whole to be zero."""
        return self.up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d_in] to [..., d_out]."""
        return self.up(self.down(x))


class FeedForwardBlock(nn.Module):
    """Δf = an MLP of f with ReLU between its layers; no hidden layer makes it linear. The last map starts at zero."""

    needs_latents = True

    def __init__(self, d_sae: int, hidden_layers: int, hidden_size: int | None, rank: int | None) -> None:
        super().__init__()
        widths = [d_sae, *[hidden_size or d_sae] * hidden_layers, d_sae]
        layers: list[nn.Module] = []
        for i, (d_in, d_out) in enumerate(pairwise(widths)):
            if i > 0:
                layers.append(nn.ReLU())
            layers.append(LowRankLinear(d_in, d_out, rank) if rank else nn.Linear(d_in, d_out))
        self.layers = nn.Sequential(*layers)
        final = layers[-1].last if isinstance(layers[-1], LowRankLinear) else layers[-1]
        nn.init.zeros_(final.weight)  # type: ignore[arg-type]
        nn.init.zeros_(final.bias)  # type: ignore[arg-type]

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Δf of the latents' shape."""
        return self.layers(latents)


def make_block(config: IsaerftConfig, d_sae: int) -> nn.Module:
    """The block of ``config.kind`` for ``d_sae`` latents."""
    if config.kind == "bias":
        return BiasBlock(d_sae)
    if config.kind == "scale":
        return ScaleBlock(d_sae)
    hidden_layers = config.hidden_layers if config.kind == "mlp" else 0
    return FeedForwardBlock(d_sae, hidden_layers, config.hidden_size, config.rank)
