"""The card of an adapter that was imported: what its folder and its name tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from isaerft_sweep import naming
from isaerft_sweep.results.card import count_parameters, sites_table
from isaerft_sweep.results.card_words import BLOCKS, CITATIONS, WITH_ADAPTER, quick_start


def imported_card(folder: Path, source: str, base: str, kind: str, named: naming.ParsedName | None) -> str:
    """The text for the adapter in ``folder``, which was called ``source`` and trained on ``base``."""
    tags = naming.tags(named.learning_rate, named.beta) if named else ("generated_from_trainer", "isaerft")
    front: dict[str, Any] = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "model_name": source,
        "tags": list(tags),
        "licence": "license",
    }
    told = ""
    if named:
        told = (
            f"Its name tells: learning rate {named.learning_rate:.1e} (two digits), beta {named.beta!r}, started "
            f"{named.started:%Y-%m-%d %H:%M}.\n\n"
        )
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# Model Card for {source}\n\nAn ISAERFT adapter for "
        f"[{base}](https://huggingface.co/{base}), imported by isaerft-sweep from the format of the published project.\n\n"
        f"{told}## Quick start\n\n{quick_start(WITH_ADAPTER)}\n\n## Adapter\n\nKind `{kind}`: the latents f become "
        f"{BLOCKS[kind]}; the SAE's reconstruction error is kept. {count_parameters(folder):,} parameters.\n\n"
        f"{sites_table(folder)}\n\n## Citations\n\n{CITATIONS}\n"
    )
