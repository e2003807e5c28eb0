"""Greedy answers to held-out prompts: their length, how much they repeat, and their NLL under the base model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise

import peft
import torch
from datasets import Dataset

from isaerft_sweep.adapter.generate import greedy
from isaerft_sweep.trial.forward.upper_layers import UpperLayers

MAX_NEW_TOKENS = 64
"""Length of an answer, at most."""


def held_out_prompts(pairs: Dataset, count: int) -> list[list[int]]:
    """Token ids of the first ``count`` different prompts of tokenised pairs; fewer when there are fewer."""
    columns = zip(pairs["chosen_ids"], pairs["chosen_prompt_length"], strict=True)
    prompts = dict.fromkeys(tuple(ids[:length]) for ids, length in columns if length)
    return [list(prompt) for prompt in list(prompts)[:count]]


@torch.inference_mode()
def measure_generations(
    model: peft.PeftModel,
    prompts: Sequence[list[int]],
    pad: int,
    above: UpperLayers | None,
    base_prompts: Sequence[list[int]] | None = None,
) -> dict[str, float]:
    """Metrics of the greedy answers to ``prompts`` by name; a metric without any token to measure is left out.

    ``generation_tokens``: mean length in tokens. ``generation_repeated``: share of 4-grams that came before in their answer.
    ``generation_distinct2``: distinct bigrams over bigrams of all answers (arXiv 1510.03055). ``generation_base_nll``: NLL
    of the answers' tokens without the adapter, nats per token.

    Args:
        model: with its adapter.
        prompts: token ids.
        pad: id of the padding token.
        above: has replaced the model's frozen layers, whose output is known for the pairs only; None: nothing is replaced.
        base_prompts: token ids of the prompts for the model without the adapter; None: the same.
    """
    with above.restored() if above else nullcontext():
        answers = [greedy(model, prompt, MAX_NEW_TOKENS, pad) for prompt in prompts]
        with model.disable_adapter():
            losses = [loss for pair in zip(base_prompts or prompts, answers, strict=True) for loss in _nll(model, *pair)]
    bigrams = [bigram for answer in answers for bigram in pairwise(answer)]
    values: dict[str, list[float]] = {
        "generation_tokens": [len(answer) for answer in answers],
        "generation_repeated": [gram in grams[:i] for grams in map(_four_grams, answers) for i, gram in enumerate(grams)],
        "generation_distinct2": [bigram not in bigrams[:i] for i, bigram in enumerate(bigrams)],
        "generation_base_nll": losses,
    }
    return {name: sum(one) / len(one) for name, one in values.items() if one}


def _four_grams(answer: list[int]) -> list[tuple[int, ...]]:
    return [tuple(answer[i : i + 4]) for i in range(len(answer) - 3)]


def _nll(model: peft.PeftModel, prompt: list[int], answer: list[int]) -> list[float]:
    """−log p of each token of ``answer`` after ``prompt``."""
    if not answer:
        return []
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    losses: list[float] = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="none").tolist()
    return losses
