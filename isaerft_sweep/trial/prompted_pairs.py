"""Held-out text behind a system prompt, for the control that has one instead of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from isaerft_sweep.adapter.system_prompt import SystemPrompt
from isaerft_sweep.preferences import ANSWERS
from isaerft_sweep.trial.pair_batch import pair_key


def prompted_pairs(rows: Dataset, prompt: SystemPrompt) -> Dataset:
    """Tokenised pairs with the system prompt before them. The answers' tokens and the pairs' keys stay those of ``rows``."""

    def longer(row: dict[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = {"key": pair_key(row["chosen_ids"], row["rejected_ids"])}
        for side in ANSWERS:
            ids, length = row[f"{side}_ids"], row[f"{side}_prompt_length"]
            before = prompt.ids_before(row["prompt"], ids[:length])
            changed |= {f"{side}_ids": before + ids[length:], f"{side}_prompt_length": len(before)}
        return {**row, **changed}

    if not len(rows):
        return rows
    return Dataset.from_list([longer(row) for row in rows])


def prompted_texts(texts: Sequence[list[int]], prompt: SystemPrompt) -> tuple[list[list[int]], int]:
    """Token ids of texts behind the system prompt, and how many of each are not the text's own."""
    longer = [prompt.ids_before_text(ids) for ids in texts]
    return [ids for ids, _ in longer], longer[0][1] if longer else 0
