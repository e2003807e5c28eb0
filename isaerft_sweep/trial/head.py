"""Log-probabilities of given tokens without ever holding all logits.

ORPO reads one number per token, yet a plain forward pass makes a logit per token and vocabulary entry, several times over:
with 256k entries that sets the memory. As the head is frozen, each token's gradient with respect to its hidden state is
computed on the spot and kept instead of the logits (as Liger kernels do, arXiv 2410.10989), so the backward pass is one
multiplication.

Most heads are a linear map, soft-capped or not. Those run over blocks of the vocabulary, with a running softmax (arXiv
1805.02867, algorithm 3): a block's logits are used while they are in the processor's cache. Any other head runs as the
model's own code, over chunks of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from isaerft_sweep.adapter.architecture import decoder_name

CHUNK_ELEMENTS = 2**25
"""Logits held at a time: 128 MiB in float32."""
CPU_BLOCK = 2048
"""Vocabulary entries at a time on a processor: with the states of some hundred tokens they fit its cache."""
PROBE_ERROR = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far logits may be from the model's own, relative to their size, for the head to count as a linear map."""

Numbers = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""log p(target) and the mean logit, float32 [n]; the gradient of the former with respect to the states [n, hidden]."""


class _States(BaseModelOutputWithPast):
    """A decoder's output with nothing but its states: whatever else a family's head asks for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class FixedHiddenStates(nn.Module):
    """Stands where the decoder was and gives out hidden states that are already there."""

    hidden: torch.Tensor

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return _States(last_hidden_state=self.hidden)


@dataclass(frozen=True)
class AnyHead:
    """``logits`` maps hidden states [n, hidden] to logits [n, vocabulary] in a way of its own."""

    logits: Callable[[torch.Tensor], torch.Tensor]
    vocabulary: int

    def numbers(self, hidden: torch.Tensor, targets: torch.Tensor, slopes_wanted: bool) -> Numbers:
        """Over chunks of the tokens, with autograd for the head."""
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        means = torch.empty_like(logps)
        slopes = torch.empty_like(hidden) if slopes_wanted else None
        chunk = max(1, CHUNK_ELEMENTS // self.vocabulary)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(slopes_wanted):
                leaf = hidden[part].detach().requires_grad_(slopes_wanted)
                logits = self.logits(leaf).float()
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
        return logps, means, slopes


@dataclass(frozen=True)
class LinearHead:
    """logits = h Wᵀ + c; with a ``cap``, cap · tanh of that / cap (Gemma 2, arXiv 2408.00118, section 2)."""

    linear: nn.Linear
    cap: float | None

    def block_logits(self, hidden: torch.Tensor, start: int, end: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """[n, end − start] of the logits, in the states' dtype."""
        weight, bias = self.linear.weight[start:end], self.linear.bias
        logits = (
            torch.mm(hidden, weight.T, out=out) if bias is None else nn.functional.linear(hidden, weight, bias[start:end])
        )
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def numbers(self, hidden: torch.Tensor, targets: torch.Tensor, slopes_wanted: bool) -> Numbers:
        """Over blocks of the vocabulary, with a softmax that is rescaled when a block brings a larger logit."""
        count, width = hidden.shape
        vocabulary = self.linear.out_features
        block = CPU_BLOCK if hidden.device.type == "cpu" else CHUNK_ELEMENTS // max(1, count)
        block = max(1, min(block, CHUNK_ELEMENTS // max(1, count), vocabulary))
        largest = torch.full((count, 1), -torch.inf, device=hidden.device)
        total, sums, chosen = (torch.zeros_like(largest) for _ in range(3))
        weighted = torch.zeros(count, width, device=hidden.device) if slopes_wanted else None
        at_target = torch.ones_like(largest)
        room = hidden.new_empty(count, block)
        for start in range(0, vocabulary, block):
            end = min(start + block, vocabulary)
            logits = self.block_logits(hidden, start, end, room if end - start == block else None).float()
            place = (targets[:, None] - start).clamp(0, end - start - 1)
            inside = place == targets[:, None] - start
            chosen = torch.where(inside, logits.gather(1, place), chosen)
            sums += logits.sum(1, keepdim=True)
            bent = None
            if self.cap is not None and slopes_wanted:
                bent = 1 - (logits / self.cap).square_()  # the derivative of the cap
                at_target = torch.where(inside, bent.gather(1, place), at_target)
            raised = torch.maximum(largest, logits.amax(1, keepdim=True))
            shares, shrunk = logits.sub_(raised).exp_(), (largest - raised).exp_()
            total, largest = total.mul_(shrunk).add_(shares.sum(1, keepdim=True)), raised
            if weighted is not None:
                shares = (shares if bent is None else shares.mul_(bent)).to(hidden.dtype)
                weight = self.linear.weight[start:end]
                weighted.mul_(shrunk)
                weighted = (
                    weighted.addmm_(shares, weight) if hidden.dtype == torch.float32 else weighted.add_(shares @ weight)
                )
        logps, means = (chosen - largest - total.log())[:, 0], (sums / vocabulary)[:, 0]
        if weighted is None:
            return logps, means, None
        slopes = at_target * self.linear.weight[targets] - weighted / total  # of log p: the target's row less the mean row
        return logps, means, slopes.to(hidden.dtype)


Head = AnyHead | LinearHead

_LINEAR: WeakKeyDictionary[PreTrainedModel, LinearHead | None] = WeakKeyDictionary()


def model_head(model: PreTrainedModel) -> Head:
    """What the model does after its decoder: its head, soft-capping, scaling."""
    own = own_head(model)
    if model not in _LINEAR:
        _LINEAR[model] = _as_linear(model, own)
    return _LINEAR[model] or own


def own_head(model: PreTrainedModel) -> AnyHead:
    """The model's own forward, with the decoder's place taken meanwhile, so that every family keeps its own code."""
    given, name = FixedHiddenStates(), decoder_name(model)
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        decoder = getattr(model, name)
        given.hidden = hidden[None]
        setattr(model, name, given)
        try:
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
            return logits
        finally:
            setattr(model, name, decoder)

    return AnyHead(head, model.config.get_text_config().vocab_size)


@torch.no_grad()
def _as_linear(model: PreTrainedModel, own: AnyHead) -> LinearHead | None:
    """The model's head if it is a linear map with or without a cap, by its logits for a few states; else None."""
    linear: Any = model.get_output_embeddings()
    if type(linear) is not nn.Linear:  # a subclass may keep its weight in another form
        return None
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    head = LinearHead(linear, cap)
    generator = torch.Generator().manual_seed(0)
    # large enough that a cap bends the logits
    hidden = (10 * torch.randn(4, linear.in_features, generator=generator)).to(linear.weight.device, linear.weight.dtype)
    expected = own.logits(hidden).float()
    found = head.block_logits(hidden, 0, linear.out_features).float()
    if found.shape != expected.shape:
        return None
    apart = float((found - expected).norm() / expected.norm())
    return head if apart < PROBE_ERROR.get(hidden.dtype, 1e-5) else None


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
        logps, means, slopes = head.numbers(hidden, targets, ctx.needs_input_grad[0])
        if slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(means)
        return logps, means

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return gradients[0][:, None].to(slopes.dtype) * slopes, None, None


def token_logps(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target) and the mean logit for every row of ``hidden`` [n, hidden]; targets [n]; both float32 [n].

    ``head`` must be frozen: no gradient reaches its weights.
    """
    return _TokenLogps.apply(hidden, targets, head)  # type: ignore[no-any-return,no-untyped-call]
