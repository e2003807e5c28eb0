"""The card of an adapter that was imported: what its folder and its name tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from isaerft_sweep import naming
from isaerft_sweep.results.card import count_parameters, sites_table
from isaerft_sweep.results.card_words import BLOCKS, WITH_ADAPTER, citations, quick_start


@dataclass(frozen=True)
class PublishedCard:
    """What a published folder tells of its run: its name (``named``), and the card in it, which has every digit.

    ``wandb``: the address of the run in W&B.
    """

    named: naming.ParsedName | None = None
    learning_rate: float | None = None
    beta: float | None = None
    tags: tuple[str, ...] = ()
    base: str | None = None
    wandb: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """For ``imported.json``: what is known."""
        known: dict[str, Any] = {
            "model": self.named.model if self.named else None,
            "learning_rate": self.learning_rate,
            "beta": self.beta,
            "started": self.named.started.isoformat() if self.named else None,
            "wandb": self.wandb,
            "tags": list(self.tags) or None,
        }
        return {key: value for key, value in known.items() if value is not None}


def imported_card(folder: Path, source: str, base: str, kind: str, card: PublishedCard) -> str:
    """The text for the adapter in ``folder``, which was called ``source`` and trained on ``base``."""
    tags: tuple[str, ...] = card.tags or ("generated_from_trainer", "isaerft")
    if not card.tags and card.learning_rate is not None and card.beta is not None:
        tags = naming.tags(card.learning_rate, card.beta)
    front: dict[str, Any] = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "model_name": source,
        "tags": list(tags),
        "licence": "license",
    }
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# Model Card for {source}\n\nAn ISAERFT adapter for "
        f"[{base}](https://huggingface.co/{base}), imported by isaerft-sweep from the format of the published project.\n\n"
        f"{_told(card)}## Quick start\n\n{quick_start(WITH_ADAPTER)}\n\n## Adapter\n\nKind `{kind}`: the latents f become "
        f"{BLOCKS[kind]}; the SAE's reconstruction error is kept. {count_parameters(folder):,} parameters.\n\n"
        f"{sites_table(folder)}\n\n## Citations\n\n{citations('orpo')}\n"
    )


def _told(card: PublishedCard) -> str:
    """Learning rate, beta, start and W&B run, and which of card and name they are from."""
    words = []
    exact = any(tag.startswith("lr_") for tag in card.tags)
    if card.learning_rate is not None:
        rate = f"{card.learning_rate!r}" if exact else f"{card.learning_rate:.1e} (two digits)"
        beta = f", beta {card.beta!r}" if card.beta is not None else ""
        started = f", started {card.named.started:%Y-%m-%d %H:%M}" if card.named else ""
        words.append(f"Its {'card' if exact else 'name'} tells: learning rate {rate}{beta}{started}.")
    if card.wandb:
        words.append(f"[Its run in Weights & Biases]({card.wandb}).")
    return "".join(f"{word}\n\n" for word in words)
