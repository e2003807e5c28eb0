"""Adapters that move few latents: an L1 proximal step, or the k latents that steer most.

Adam divides each gradient by its own size, so every latent's number moves by about the learning rate, and none stays at
zero. Both ways act on the parameters right after the optimiser's step, where Adam does not undo them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from isaerft_sweep.adapter.layer import IsaerftLayer
from isaerft_sweep.specs import AdapterSpec


def sparsity_callbacks(spec: AdapterSpec) -> list[TrainerCallback]:
    """What the trainer needs for ``adapter.l1`` or ``adapter.top_k``."""
    if spec.l1:
        return [L1Proximal(spec.l1)]
    return [TopK(spec.top_k)] if spec.top_k else []


class L1Proximal(TrainerCallback):
    """After each step p ← sign(p) · max(|p| − lr · l1, 0), the proximal operator of lr · l1 · ‖p‖₁.

    (Parikh and Boyd 2014, Proximal Algorithms, section 6.5.2.) A step of Adam moves a number by at most about lr, so with
    l1 = 0.5 a latent must be pushed the same way more often than not to leave zero.
    """

    def __init__(self, l1: float) -> None:
        self.l1 = l1

    @torch.no_grad()
    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        limit = given["optimizer"].param_groups[0]["lr"] * self.l1
        for parameter, _ in _numbers_per_latent(given["model"]):
            parameter.copy_(torch.nn.functional.softshrink(parameter, limit))


class TopK(TrainerCallback):
    """In the middle of training all but k latents per site are set to zero, and stay there.

    The k with the largest |p_i| · ‖W_dec,i‖ are kept: for the bias, the latents with the longest part in the steering
    vector. Which ones they are can be read from the parameters themselves, so a resumed trial goes on the same way.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._kept: list[torch.Tensor] = []

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        self._kept = [parameter != 0 for parameter, _ in _numbers_per_latent(given["model"])]

    @torch.no_grad()
    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        done, middle = state.global_step + 1, max(1, state.max_steps // 2)  # the state counts this step afterwards
        if done < middle:
            return
        for kept, (parameter, decoder) in zip(self._kept, _numbers_per_latent(given["model"]), strict=True):
            if done == middle:
                weight = parameter.abs() * decoder.norm(dim=-1)
                kept = torch.zeros_like(kept).index_fill(0, weight.topk(min(self.k, len(weight))).indices, True)
            parameter.mul_(kept)


def _numbers_per_latent(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """For each site the block's vector [d_sae] and the SAE's decoder [d_sae, d_in]."""
    for module in model.modules():
        if isinstance(module, IsaerftLayer):
            for name, block in module.isaerft_block.items():
                yield next(iter(block.parameters())), module.decoder(name)
