"""Losses of preference pairs: ORPO, DPO, SimPO, CPO.

A loss is ``nll_weight`` · NLL + the mean of ``pair_losses`` over the batch's pairs. π is the adapted model; log π(y|x) is
the sum of the answer's token log-probabilities, and a bar over it is the mean per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from isaerft_sweep.specs import OrpoSpec

LN_HALF = -0.6931471805599453


@dataclass(frozen=True)
class PairLogps:
    """What the model says of a batch of pairs; tensors are float32 [pair] unless stated.

    ``chosen`` and ``rejected``: mean log-probability per answer token. ``chosen_tokens`` and ``rejected_tokens``: how many
    there are. ``nll``: scalar, the mean over all tokens of prompt and chosen answer, where that was read.
    ``reference_chosen`` and ``reference_rejected``: the model without the adapter, summed over the answer's tokens, where
    the loss needs it.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    nll: torch.Tensor | None = None
    reference_chosen: torch.Tensor | None = None
    reference_rejected: torch.Tensor | None = None

    @property
    def chosen_sum(self) -> torch.Tensor:
        return self.chosen * self.chosen_tokens

    @property
    def rejected_sum(self) -> torch.Tensor:
        return self.rejected * self.rejected_tokens

    @property
    def answer_nll(self) -> torch.Tensor:
        """Scalar: the mean over the chosen answers' tokens."""
        return -self.chosen_sum.sum() / self.chosen_tokens.sum()

    @property
    def log_odds(self) -> torch.Tensor:
        """log odds(chosen) − log odds(rejected), of the mean log-probabilities (arXiv 2403.07691, equations 4 and 7)."""
        return (self.chosen - self.rejected) - (_log1mexp(self.chosen) - _log1mexp(self.rejected))


class PreferenceLoss(ABC):
    """A loss of pairs, with what it needs of the forward pass."""

    nll_weight = 0.0
    """Of the NLL in the loss."""
    reads_prompt = False
    """Whether that NLL is of prompt and answer; else of the answer alone."""
    needs_reference = False
    """Whether it compares with the model without the adapter."""

    def __init__(self, spec: OrpoSpec) -> None:
        self.beta, self.gamma = spec.beta, spec.gamma

    @abstractmethod
    def pair_losses(self, logps: PairLogps) -> torch.Tensor:
        """The loss of each pair, without the NLL [pair]."""

    @abstractmethod
    def rewards(self, logps: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
        """The implicit rewards of the chosen and of the rejected answers [pair]."""

    def nll(self, logps: PairLogps) -> torch.Tensor:
        """The NLL that the loss counts in, scalar."""
        if not self.reads_prompt:
            return logps.answer_nll
        assert logps.nll is not None
        return logps.nll

    def __call__(self, logps: PairLogps) -> torch.Tensor:
        """The loss of a batch, scalar."""
        mean = self.pair_losses(logps).mean()
        return self.nll_weight * self.nll(logps) + mean if self.nll_weight else mean


class OrpoLoss(PreferenceLoss):
    """NLL(prompt and chosen) − β · log σ(log odds ratio): arXiv 2403.07691, equations 6, 7; the prompt counts as in TRL."""

    nll_weight, reads_prompt = 1.0, True

    def pair_losses(self, logps: PairLogps) -> torch.Tensor:
        return -(self.beta * logsigmoid(logps.log_odds))

    def odds_ratio(self, logps: PairLogps) -> torch.Tensor:
        """The odds-ratio term for β = 1, scalar: the loss is NLL + β · it."""
        return -logsigmoid(logps.log_odds).mean()

    def rewards(self, logps: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
        return self.beta * logps.chosen, self.beta * logps.rejected


class DpoLoss(PreferenceLoss):
    """−log σ(β · (log π/π_ref(chosen) − log π/π_ref(rejected))) (arXiv 2305.18290, equation 7)."""

    needs_reference = True

    def pair_losses(self, logps: PairLogps) -> torch.Tensor:
        chosen, rejected = self.rewards(logps)
        return -logsigmoid(chosen - rejected)

    def rewards(self, logps: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
        assert logps.reference_chosen is not None and logps.reference_rejected is not None
        return (
            self.beta * (logps.chosen_sum - logps.reference_chosen),
            self.beta * (logps.rejected_sum - logps.reference_rejected),
        )


class SimpoLoss(PreferenceLoss):
    """−log σ(β · (mean log π(chosen) − mean log π(rejected)) − γ) (arXiv 2405.14734, equation 6)."""

    def pair_losses(self, logps: PairLogps) -> torch.Tensor:
        return -logsigmoid(self.beta * (logps.chosen - logps.rejected) - self.gamma)

    def rewards(self, logps: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
        return self.beta * logps.chosen, self.beta * logps.rejected


class CpoLoss(PreferenceLoss):
    """NLL(chosen) − log σ(β · (log π(chosen) − log π(rejected))) (arXiv 2401.08417, equations 3 to 5)."""

    nll_weight = 1.0

    def pair_losses(self, logps: PairLogps) -> torch.Tensor:
        return -logsigmoid(self.beta * (logps.chosen_sum - logps.rejected_sum))

    def rewards(self, logps: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
        return self.beta * logps.chosen_sum, self.beta * logps.rejected_sum


LOSSES: dict[str, type[PreferenceLoss]] = {"orpo": OrpoLoss, "dpo": DpoLoss, "simpo": SimpoLoss, "cpo": CpoLoss}


def make_loss(spec: OrpoSpec) -> PreferenceLoss:
    """The loss that ``orpo.loss`` names."""
    return LOSSES[spec.loss](spec)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 − exp(x)) for x < 0, without cancellation on either side of −ln 2 (Mächler 2012, Rmpfr's log1mexp note)."""
    return torch.where(x < LN_HALF, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))
