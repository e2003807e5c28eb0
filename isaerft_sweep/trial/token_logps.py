"""Log-probabilities of given tokens without ever holding all logits.

ORPO reads one number per token, yet a plain forward pass makes a logit per token and vocabulary entry, several times over:
with 256k entries that sets the memory. Here the model's head runs on chunks of the positions that the loss reads. As the
head is frozen, each token's gradient with respect to its hidden state is computed on the spot and kept instead of the
logits (as Liger kernels do, arXiv 2410.10989), so the backward pass is one multiplication.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

CHUNK_ELEMENTS = 2**25
"""Logits held at a time: 128 MiB in float32."""

Head = Callable[[torch.Tensor], torch.Tensor]


class _Given(nn.Module):
    """Stands where the decoder was and gives out hidden states that are already there."""

    hidden: torch.Tensor

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


def model_head(model: PreTrainedModel) -> Head:
    """What the model does after its decoder (its head, soft-capping, scaling): hidden [n, hidden] to logits [n, vocabulary].

    The model's own forward runs, with the decoder's place taken meanwhile, so that every family keeps its own code.
    """
    given = _Given()
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        decoder = getattr(model, model.base_model_prefix)
        given.hidden = hidden[None]
        setattr(model, model.base_model_prefix, given)
        try:
            return model(input_ids=ids, use_cache=False).logits[0]
        finally:
            setattr(model, model.base_model_prefix, decoder)

    return head


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head, chunk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        means = torch.empty_like(logps)
        wanted = ctx.needs_input_grad[0]
        slopes = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(wanted):
                leaf = hidden[part].detach().requires_grad_(wanted)
                logits = head(leaf).float()
            values, target = logits.detach(), targets[part, None]
            norms = values.logsumexp(-1, keepdim=True)
            logps[part] = values.gather(-1, target)[:, 0] - norms[:, 0]
            means[part] = values.mean(-1)
            if slopes is not None:
                # the gradient of log p(target) is 1(target) − softmax, written over the logits: each further array of their
                # size costs as much time as the arithmetic. A token's log-probability depends on its own state alone, so
                # the gradient of the sum is each one's own
                values.sub_(norms).exp_().neg_()
                values.scatter_add_(-1, target, torch.ones_like(norms))
                slopes[part] = torch.autograd.grad(logits, leaf, values)[0]
        if slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(means)
        return logps, means

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return gradients[0][:, None].to(slopes.dtype) * slopes, None, None, None


def token_logps(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target) and the mean logit for every row of ``hidden`` [n, hidden]; targets [n]; both float32 [n].

    ``head`` must be frozen: no gradient reaches its weights.
    """
    return _TokenLogps.apply(hidden, targets, head, max(1, CHUNK_ELEMENTS // vocabulary))  # type: ignore[no-any-return,no-untyped-call]
