"""The trainable blocks: each maps latents f [..., d_sae] to the change Δf that it adds to them, zero at the start."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from isaerft_sweep.adapter.config import CONSTANT, LOREFT_RANK, IsaerftConfig


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


class FeedForwardBlock(nn.Module):
    """Δf = an MLP of f with ReLU between its maps; without hidden layers it is linear. The last map starts at zero.

    Map i is x ↦ W x + c with ``weight_i`` [d_out, d_in] and ``bias_i``; of low rank it is W D x + c with ``down_i``
    [rank, d_in] and ``weight_i`` [d_out, rank] (as LoRA, arXiv 2106.09685, without a frozen base).

    Args:
        d_sae: number of latents.
        hidden_layers: 0 for a linear map.
        hidden_size: width of the hidden layers; None: ``d_sae``.
        rank: of every map; None: full.
    """

    # no submodules: PEFT removes the adapter's name from a saved key only one level up
    needs_latents = True

    def __init__(self, d_sae: int, hidden_layers: int, hidden_size: int | None, rank: int | None) -> None:
        super().__init__()
        widths = [d_sae, *[hidden_size or d_sae] * hidden_layers, d_sae]
        self.maps = len(widths) - 1
        for i, (d_in, d_out) in enumerate(pairwise(widths)):
            if rank:
                self.register_parameter(f"down_{i}", nn.Parameter(nn.Linear(d_in, rank, bias=False).weight))
            linear = nn.Linear(rank or d_in, d_out)
            self.register_parameter(f"weight_{i}", nn.Parameter(linear.weight))
            self.register_parameter(f"bias_{i}", nn.Parameter(linear.bias))
        for name in ("weight", "bias"):
            nn.init.zeros_(getattr(self, f"{name}_{self.maps - 1}"))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Δf of the latents' shape."""
        x = latents
        for i in range(self.maps):
            x = x.relu() if i else x
            if hasattr(self, f"down_{i}"):
                x = nn.functional.linear(x, getattr(self, f"down_{i}"))
            x = nn.functional.linear(x, getattr(self, f"weight_{i}"), getattr(self, f"bias_{i}"))
        return x


class LoreftBlock(nn.Module):
    """Δx = Rᵀ(Wx + c − Rx) with R [rank, d_in] of orthonormal rows, on the stream x itself (arXiv 2404.03592, eq. 2).

    R is Q of the QR decomposition of a free matrix. W begins at R and c at zero, so that Δx is zero at the start.
    """

    needs_latents = True

    def __init__(self, d_in: int, rank: int) -> None:
        super().__init__()
        self.rotation = nn.Parameter(torch.linalg.qr(torch.randn(d_in, rank)).Q)
        self.weight = nn.Parameter(self.rows().detach().clone())
        self.bias = nn.Parameter(torch.zeros(rank))

    def rows(self) -> torch.Tensor:
        """R [rank, d_in]; with positive diagonals in the decomposition, so that R depends on the matrix continuously."""
        decomposed = torch.linalg.qr(self.rotation.float())
        rows: torch.Tensor = (decomposed.Q * decomposed.R.diagonal().sign()).T
        return rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Δx of the shape of x [..., d_in]."""
        rows = self.rows().to(x.dtype)
        change: torch.Tensor = nn.functional.linear(x, self.weight.to(x.dtype) - rows, self.bias.to(x.dtype)) @ rows
        return change


def make_block(config: IsaerftConfig, d_sae: int) -> nn.Module:
    """The block of ``config.kind`` for ``d_sae`` latents, or coordinates of the residual stream."""
    if config.kind in (*CONSTANT, "prompt"):  # a prompt's stays zero
        return BiasBlock(d_sae)
    if config.kind == "loreft":
        return LoreftBlock(d_sae, config.rank or LOREFT_RANK)
    if config.kind == "scale":
        return ScaleBlock(d_sae)
    hidden_layers = config.hidden_layers if config.kind == "mlp" else 0
    return FeedForwardBlock(d_sae, hidden_layers, config.hidden_size, config.rank)
