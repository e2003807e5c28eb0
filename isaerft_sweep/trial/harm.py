"""What an adapter changes besides the preference: its distance from the base model, and its loss on unrelated text.

Log odds rise with the strength of an adapter while the model drifts away, so a gain is only worth something beside its harm:
KL(base ‖ adapted) per token of held-out answers, and the NLL of neutral text compared with the base model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from isaerft_sweep.errors import DataError
from isaerft_sweep.paths import asset
from isaerft_sweep.preferences import expanded
from isaerft_sweep.trial.forward.batch_layout import Batch, padded
from isaerft_sweep.trial.forward.head import own_head
from isaerft_sweep.trial.forward.strategy import ForwardStrategy, make_layout, read_states
from isaerft_sweep.trial.pair_batch import pair_batch
from isaerft_sweep.trial.reference import without_adapter

KL_PAIRS = 64
"""Held-out pairs whose chosen answers the KL divergence is measured on, at most."""
CHUNK_ELEMENTS = 2**24
"""Logits of one model held at a time."""


@dataclass(frozen=True)
class HarmProbe:
    """Text that an adapter's harm is measured on.

    ``pairs``: tokenised held-out pairs. ``neutral``: token ids of unrelated text. ``pad``: id of the padding.
    ``batch_size``: sequences per forward pass. ``neutral_start``: tokens at the start of each text that are not read,
    besides the first one, which never is.
    """

    pairs: Dataset
    neutral: list[list[int]]
    pad: int
    batch_size: int
    neutral_start: int = 0

    def answers(self, device: torch.device) -> Iterator[Batch]:
        """The chosen sequences; the tokens of the answers are read."""
        rows = self.pairs.select(range(min(KL_PAIRS, len(self.pairs))))
        for start in range(0, len(rows), self.batch_size):
            batch = pair_batch(rows[start : start + self.batch_size], self.pad, device, read_prompt=False)
            chosen = batch.batch.ids[: batch.pairs], batch.batch.mask[: batch.pairs], batch.answer[: batch.pairs]
            yield Batch(*chosen, pairs=())

    def texts(self, device: torch.device) -> Iterator[Batch]:
        """The neutral text."""
        for start in range(0, len(self.neutral), self.batch_size):
            ids, mask = padded(self.neutral[start : start + self.batch_size], self.pad, device)
            read = mask[:, 1:].bool()
            read[:, : self.neutral_start] = False
            yield Batch(ids, mask, read, pairs=())


@dataclass(frozen=True)
class Baseline:
    """The base model's side: its states on the CPU for each batch of answers (see ``_states``), its NLL of neutral text."""

    states: list[torch.Tensor]
    neutral_nll: float


@torch.no_grad()
def measure_baseline(model: peft.PeftModel, probe: HarmProbe, strategy: ForwardStrategy) -> Baseline:
    """The base model on the probe's text: ``model`` with its adapter off."""
    with without_adapter(model) as base:
        states = [_states(base, batch, strategy).cpu() for batch in probe.answers(base.device)]
        return Baseline(states, _neutral_nll(base, probe, strategy))


@torch.no_grad()
def measure_harm(model: peft.PeftModel, probe: HarmProbe, strategy: ForwardStrategy, baseline: Baseline) -> dict[str, float]:
    """Metrics by name: ``kl_base``, nats per answer token; ``neutral_nll`` and its rise over the base's, nats per token.

    Args:
        model: with its adapter.
        probe: the text; answers are read with their end-of-turn tokens.
        strategy: how batches go through the model.
        baseline: of the same probe and strategy.
    """
    base = model.get_base_model()
    total, tokens = 0.0, 0
    for batch, base_states in zip(probe.answers(base.device), baseline.states, strict=True):
        divergence = _divergence(base, base_states, _states(base, batch, strategy), strategy)
        total, tokens = total + float(divergence.sum()), tokens + len(divergence)
    nll = _neutral_nll(base, probe, strategy)
    return {"kl_base": total / tokens, "neutral_nll": nll, "neutral_nll_rise": nll - baseline.neutral_nll}


def read_neutral(path: str | None, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Token ids of the neutral text: a text per line of ``path``, or of the file that ships with the package (None).

    Raises DataError when the file cannot be read or has no text of two tokens.
    """
    file = asset("data", "neutral.txt") if path is None else expanded(path)
    texts = [line.strip() for line in _lines(file) if line.strip()]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    sequences = [[*bos, *one][:max_length] for one in ids]
    sequences = [one for one in sequences if len(one) > 1]
    if not sequences:
        raise DataError(f"data.neutral_path must be a text file with a text per line, but {file} has none of two tokens.")
    return sequences


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.neutral_path must be a text file in UTF-8 but {file} cannot be read: {error}.") from error


def _states(model: PreTrainedModel, batch: Batch, strategy: ForwardStrategy) -> torch.Tensor:
    """Of each token that is read the hidden state [n, hidden]; of a strategy that is not lean its logits [n, vocabulary]."""
    if not strategy.lean:
        logits = model(batch.ids, attention_mask=batch.mask, use_cache=False).logits
        return logits[:, :-1][batch.read]  # type: ignore[no-any-return]
    layout = make_layout(batch, share_prompts=False)
    return read_states(model, batch, layout, strategy.prepare(batch, layout))


def _divergence(
    model: PreTrainedModel, of_base: torch.Tensor, of_adapted: torch.Tensor, strategy: ForwardStrategy
) -> torch.Tensor:
    """KL(base ‖ adapted) of each token's distribution, nats [n], some tokens at a time."""
    head = own_head(model)
    size = max(1, CHUNK_ELEMENTS // head.vocabulary)
    parts = []
    for start in range(0, len(of_adapted), size):
        pair = (of_base[start : start + size].to(of_adapted), of_adapted[start : start + size])
        logps, adapted = ((head.logits(x) if strategy.lean else x).float().log_softmax(-1) for x in pair)
        parts.append((logps.exp() * (logps - adapted)).sum(-1))
    return torch.cat(parts)


def _neutral_nll(model: PreTrainedModel, probe: HarmProbe, strategy: ForwardStrategy) -> float:
    alone = ForwardStrategy(strategy.above, lean=strategy.lean)
    logps = [alone.forward(model, batch).logps for batch in probe.texts(model.device)]
    return -float(torch.cat(logps).mean())
