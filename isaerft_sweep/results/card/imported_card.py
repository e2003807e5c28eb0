"""The card of an imported adapter, from its folder and its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from isaerft_sweep import naming
from isaerft_sweep.results.card.card_text import BLOCKS, WITH_ADAPTER, citations, quick_start
from isaerft_sweep.results.card.model_card import count_parameters, sites_table


@dataclass(frozen=True)
class PublishedCard:
    """A published run as its folder describes it: by its name (``named``, two digits) and its card (every digit).

    ``wandb``: the URL of the run in W&B.
    """

    named: naming.ParsedName | None = None
    learning_rate: float | None = None
    beta: float | None = None
    tags: tuple[str, ...] = ()
    base: str | None = None
    wandb: str | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """The content of ``imported.json``: every value that is known."""
        fields: dict[str, Any] = {
            "model": self.named.model if self.named else None,
            "learning_rate": self.learning_rate,
            "beta": self.beta,
            "started": self.named.started.isoformat() if self.named else None,
            "wandb": self.wandb,
            "tags": list(self.tags) or None,
        }
        return {key: value for key, value in fields.items() if value is not None}


def imported_card(folder: Path, source: str, base: str, kind: str, card: PublishedCard) -> str:
    """The text of the card.

    Args:
        folder: has the adapter.
        source: the adapter's original name.
        base: the base model.
        kind: the adapter's kind.
        card: the published run.
    """
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
        f"{_run_description(card)}## Quick start\n\n{quick_start(WITH_ADAPTER)}\n\n## Adapter\n\nKind `{kind}`: the "
        f"latents f become {BLOCKS[kind]}; the SAE's reconstruction error is kept. {count_parameters(folder):,} "
        f"parameters.\n\n{sites_table(folder)}\n\n## Citations\n\n{citations('orpo')}\n"
    )


def _run_description(card: PublishedCard) -> str:
    """Learning rate, beta, start and W&B run, and whether card or name is their source."""
    paragraphs = []
    from_card = any(tag.startswith("lr_") for tag in card.tags)
    if card.learning_rate is not None:
        rate = f"{card.learning_rate!r}" if from_card else f"{card.learning_rate:.1e} (two digits)"
        beta = f", beta {card.beta!r}" if card.beta is not None else ""
        started = f", started {card.named.started:%Y-%m-%d %H:%M}" if card.named else ""
        paragraphs.append(f"Its {'card' if from_card else 'name'} says: learning rate {rate}{beta}{started}.")
    if card.wandb:
        paragraphs.append(f"[Its run in Weights & Biases]({card.wandb}).")
    return "".join(f"{paragraph}\n\n" for paragraph in paragraphs)
