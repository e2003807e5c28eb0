"""Log-probabilities of target tokens without holding all logits in memory.

ORPO reads one number per token, but a plain forward pass makes several arrays of tokens × vocabulary, which dominate the
memory for 256k entries. The head is frozen, so the forward pass computes each token's gradient with respect to its hidden
state and keeps that instead of the logits (as Liger kernels do, arXiv 2410.10989); the backward pass is one multiplication.

Most heads are a linear map, with or without soft-capping. Those run over blocks of the vocabulary with an online softmax
(arXiv 1805.02867, algorithm 3), so that a block's logits stay in the CPU's cache. Any other head runs the model's own code,
over chunks of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from isaerft_sweep.adapter.architecture import decoder_name

CHUNK_ELEMENTS = 2**25
"""Logits in memory at a time: 128 MiB in float32."""
CPU_BLOCK = 2048
"""Vocabulary entries per block on a CPU: with the states of a few hundred tokens they fit its cache."""
PROBE_ERROR = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative error of the logits for a head to count as a linear map."""


class HeadOutput(NamedTuple):
    """``logps``: log p(target), and ``mean_logits``, both float32 [n]; ``dlogp_dh``: gradient of log p(target) with respect
    to the hidden state, in its dtype [n, hidden], or None if not requested."""

    logps: torch.Tensor
    mean_logits: torch.Tensor
    dlogp_dh: torch.Tensor | None


class _States(BaseModelOutputWithPast):
    """A decoder's output with only its states: any other field that a family's head reads is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class FixedHiddenStates(nn.Module):
    """Replaces the decoder and returns precomputed hidden states."""

    def __init__(self, hidden: torch.Tensor) -> None:
        """``hidden`` [1, n, hidden]: what the decoder's call returns."""
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return _States(last_hidden_state=self.hidden)


@dataclass(frozen=True)
class AnyHead:
    """A head of any form: ``logits`` maps hidden states [n, hidden] to logits [n, vocabulary]."""

    logits: Callable[[torch.Tensor], torch.Tensor]
    vocabulary: int

    def outputs(self, hidden: torch.Tensor, targets: torch.Tensor, needs_gradient: bool) -> HeadOutput:
        """For hidden states [n, hidden] and targets [n]: over chunks of the tokens, with autograd for the head."""
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        mean_logits = torch.empty_like(logps)
        dlogp_dh = torch.empty_like(hidden) if needs_gradient else None
        chunk = max(1, CHUNK_ELEMENTS // self.vocabulary)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(needs_gradient):
                leaf = hidden[part].detach().requires_grad_(needs_gradient)
                logits = self.logits(leaf).float()
            values, target = logits.detach(), targets[part, None]
            log_total = values.logsumexp(-1, keepdim=True)
            logps[part] = values.gather(-1, target)[:, 0] - log_total[:, 0]
            mean_logits[part] = values.mean(-1)
            if dlogp_dh is not None:
                # d log p(target) / d logits = 1(target) − softmax, written over the logits: another array of that size
                # would cost as much time as the arithmetic. Each token's log-probability depends only on its own state, so
                # one backward pass of the sum gives the gradient of each
                values.sub_(log_total).exp_().neg_()
                values.scatter_add_(-1, target, torch.ones_like(log_total))
                dlogp_dh[part] = torch.autograd.grad(logits, leaf, values)[0]
        return HeadOutput(logps, mean_logits, dlogp_dh)


@dataclass(frozen=True)
class LinearHead:
    """logits = h Wᵀ + c; with a ``cap``: cap · tanh(logits / cap) (Gemma 2, arXiv 2408.00118, section 2)."""

    linear: nn.Linear
    cap: float | None

    def block_logits(self, hidden: torch.Tensor, start: int, end: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [n, end − start] of the vocabulary entries start … end − 1, in the dtype of ``hidden`` [n, hidden].

        ``out``: a buffer of that shape, used if the head has no bias.
        """
        weight, bias = self.linear.weight[start:end], self.linear.bias
        logits = (
            torch.mm(hidden, weight.T, out=out) if bias is None else nn.functional.linear(hidden, weight, bias[start:end])
        )
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def outputs(self, hidden: torch.Tensor, targets: torch.Tensor, needs_gradient: bool) -> HeadOutput:
        """For hidden states [n, hidden] and targets [n]: over blocks of the vocabulary, with an online softmax."""
        count, width = hidden.shape
        vocabulary = self.linear.out_features
        block = CPU_BLOCK if hidden.device.type == "cpu" else CHUNK_ELEMENTS // max(1, count)
        block = max(1, min(block, CHUNK_ELEMENTS // max(1, count), vocabulary))
        running_max = torch.full((count, 1), -torch.inf, device=hidden.device)
        exp_sum, logit_sum, target_logit = (torch.zeros_like(running_max) for _ in range(3))
        # Σ exp(logit − max) · d logit / d h over the vocabulary
        accumulated = torch.zeros(count, width, device=hidden.device) if needs_gradient else None
        target_softcap_grad = torch.ones_like(running_max)
        buffer = hidden.new_empty(count, block)
        for start in range(0, vocabulary, block):
            end = min(start + block, vocabulary)
            logits = self.block_logits(hidden, start, end, buffer if end - start == block else None).float()
            column = (targets[:, None] - start).clamp(0, end - start - 1)
            in_block = column == targets[:, None] - start
            target_logit = torch.where(in_block, logits.gather(1, column), target_logit)
            logit_sum += logits.sum(1, keepdim=True)
            softcap_grad = None
            if self.cap is not None and needs_gradient:
                softcap_grad = 1 - (logits / self.cap).square_()
                target_softcap_grad = torch.where(in_block, softcap_grad.gather(1, column), target_softcap_grad)
            new_max = torch.maximum(running_max, logits.amax(1, keepdim=True))
            exps, rescale = logits.sub_(new_max).exp_(), (running_max - new_max).exp_()
            exp_sum, running_max = exp_sum.mul_(rescale).add_(exps.sum(1, keepdim=True)), new_max
            if accumulated is not None:
                exps = (exps if softcap_grad is None else exps.mul_(softcap_grad)).to(hidden.dtype)
                weight = self.linear.weight[start:end]
                accumulated.mul_(rescale)
                if hidden.dtype == torch.float32:
                    accumulated.addmm_(exps, weight)
                else:
                    accumulated.add_(exps @ weight)
        logps, mean_logits = (target_logit - running_max - exp_sum.log())[:, 0], (logit_sum / vocabulary)[:, 0]
        if accumulated is None:
            return HeadOutput(logps, mean_logits, None)
        # the target's row of W minus the rows' mean under the softmax, each times its soft-cap gradient
        dlogp_dh = target_softcap_grad * self.linear.weight[targets] - accumulated / exp_sum
        return HeadOutput(logps, mean_logits, dlogp_dh.to(hidden.dtype))


Head = AnyHead | LinearHead

_LINEAR: WeakKeyDictionary[PreTrainedModel, LinearHead | None] = WeakKeyDictionary()


def model_head(model: PreTrainedModel) -> Head:
    """Everything that the model computes after its decoder: head, soft-capping, scaling."""
    own = own_head(model)
    if model not in _LINEAR:
        _LINEAR[model] = _as_linear(model, own)
    return _LINEAR[model] or own


def own_head(model: PreTrainedModel) -> AnyHead:
    """The model's own forward pass with the decoder replaced during the call, so that each family's code runs."""
    name = decoder_name(model)
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        decoder = getattr(model, name)
        setattr(model, name, FixedHiddenStates(hidden[None]))
        try:
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
            return logits
        finally:
            setattr(model, name, decoder)

    return AnyHead(head, model.config.get_text_config().vocab_size)


@torch.no_grad()
def _as_linear(model: PreTrainedModel, own: AnyHead) -> LinearHead | None:
    """The model's head as a ``LinearHead`` if the logits of a few random states agree, else None."""
    linear: Any = model.get_output_embeddings()
    if type(linear) is not nn.Linear:  # a subclass may store its weight in another form
        return None
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    head = LinearHead(linear, cap)
    generator = torch.Generator().manual_seed(0)
    # large enough for soft-capping to change the logits
    hidden = (10 * torch.randn(4, linear.in_features, generator=generator)).to(linear.weight.device, linear.weight.dtype)
    expected = own.logits(hidden).float()
    logits = head.block_logits(hidden, 0, linear.out_features).float()
    if logits.shape != expected.shape:
        return None
    error = float((logits - expected).norm() / expected.norm())
    return head if error < PROBE_ERROR.get(hidden.dtype, 1e-5) else None


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
        logps, mean_logits, dlogp_dh = head.outputs(hidden, targets, ctx.needs_input_grad[0])
        if dlogp_dh is not None:
            ctx.save_for_backward(dlogp_dh)
        ctx.mark_non_differentiable(mean_logits)
        return logps, mean_logits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (dlogp_dh,) = ctx.saved_tensors
        return gradients[0][:, None].to(dlogp_dh.dtype) * dlogp_dh, None, None


def token_logps(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target) and the mean logit, both float32 [n], for hidden states [n, hidden] and targets [n].

    ``head`` must be frozen: no gradient reaches its weights.
    """
    return _TokenLogps.apply(hidden, targets, head)  # type: ignore[no-any-return,no-untyped-call]
