"""Adapters that move few latents: an L1 proximal step, or the k latents that steer most.

Adam normalises each gradient, so every latent's parameter moves by about the learning rate and none stays at zero. Both
methods act on the parameters right after the optimiser's step, so Adam does not undo them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from isaerft_sweep.adapter.layer import IsaerftLayer
from isaerft_sweep.specs import AdapterSpec


class Sparsity:
    """Hooks around each optimiser step; this class does nothing."""

    def before_step(self, model: torch.nn.Module) -> None:
        """Called before the optimiser's step."""

    def after_step(self, model: torch.nn.Module, rate: float, step: int, steps: int) -> None:
        """Called after the optimiser's step.

        Args:
            model: with the trial's adapter.
            rate: the step's learning rate.
            step: the step's number, from 1.
            steps: total number of steps.
        """


def make_sparsity(spec: AdapterSpec) -> Sparsity:
    """The method set by ``adapter.l1`` or ``adapter.top_k``."""
    if spec.l1:
        return L1Proximal(spec.l1)
    return TopK(spec.top_k) if spec.top_k else Sparsity()


class L1Proximal(Sparsity):
    """After each step p ← sign(p) · max(|p| − lr · l1, 0), the proximal operator of lr · l1 · ‖p‖₁.

    (Parikh and Boyd 2014, Proximal Algorithms, section 6.5.2.) A step of Adam moves a number by at most about lr, so with
    l1 = 0.5 a latent must be pushed the same way more often than not to leave zero.
    """

    def __init__(self, l1: float) -> None:
        self.l1 = l1

    @torch.no_grad()
    def after_step(self, model: torch.nn.Module, rate: float, step: int, steps: int) -> None:
        for parameter, _ in _latent_parameters(model):
            parameter.copy_(torch.nn.functional.softshrink(parameter, rate * self.l1))


class TopK(Sparsity):
    """In the middle of training all but k latents per hook point are set to zero, and stay zero.

    The k with the largest |p_i| · ‖W_dec,i‖ are kept: for the bias, the latents with the longest part in the steering
    vector. The parameters themselves show which ones they are, so a resumed trial continues the same way.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._kept: list[torch.Tensor] = []

    @torch.no_grad()
    def before_step(self, model: torch.nn.Module) -> None:
        self._kept = [parameter != 0 for parameter, _ in _latent_parameters(model)]

    @torch.no_grad()
    def after_step(self, model: torch.nn.Module, rate: float, step: int, steps: int) -> None:
        middle = max(1, steps // 2)
        if step < middle:
            return
        for kept, (parameter, decoder) in zip(self._kept, _latent_parameters(model), strict=True):
            if step == middle:
                weight = parameter.abs() * decoder.norm(dim=-1)
                kept = torch.zeros_like(kept).index_fill(0, weight.topk(min(self.k, len(weight))).indices, True)
            parameter.mul_(kept)


def _latent_parameters(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """For each hook point the block's parameter [d_sae] and the SAE's decoder [d_sae, d_in]."""
    for module in model.modules():
        if isinstance(module, IsaerftLayer):
            for name, block in module.isaerft_block.items():
                yield next(iter(block.parameters())), module.decoder(name)
