"""Checks everything a trial will need, in a process of its own, before any trial is dispatched.

    python -m isaerft_sweep.trial.prepare < experiment.json

Makes what has to be made once (converted weights, tiny models), so that workers find it. Prints one JSON line:
``{"ok": …}`` with facts for people, or ``{"error": …}``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import isaerft_sweep.trial  # noqa: F401  (settings that must come before trl is imported)
from isaerft_sweep.adapter.sae import FrozenSae, check_fits, describe, load_sae
from isaerft_sweep.errors import ConfigError, IsaerftError, suggest
from isaerft_sweep.models.loading import load_config, load_tokenizer
from isaerft_sweep.plain import from_mapping, to_dict
from isaerft_sweep.specs import Experiment
from isaerft_sweep.trial.data import load_pairs
from isaerft_sweep.trial.trainer import OPTIMIZERS, adapter_config, total_steps


def prepare(experiment: Experiment) -> dict[str, Any]:
    """Facts about model, SAEs and data. Raises IsaerftError when a trial could not run."""
    if experiment.orpo.optimizer not in ("auto", *OPTIMIZERS):
        raise ConfigError(
            "orpo.optimizer is unknown: " + experiment.orpo.optimizer + "." + suggest(experiment.orpo.optimizer, OPTIMIZERS)
        )
    adapter_config(experiment.adapter)
    if experiment.launcher.compile:
        _check_compiler()
    config = load_config(experiment.model, experiment.cache)
    text = config.get_text_config()
    saes = []
    for site in (to_dict(s) for s in experiment.adapter.sites):
        sae = load_sae(site)
        check_fits(sae, site, text.hidden_size, text.num_hidden_layers)
        saes.append(_describe_sae(site, sae))
    tokenizer = load_tokenizer(experiment.model, experiment.cache)
    pairs = load_pairs(experiment.data, tokenizer, experiment.orpo.max_length)
    return {
        "model": f"{experiment.model.name}: {text.num_hidden_layers} layers, hidden size {text.hidden_size}",
        "saes": saes,
        "data": f"{experiment.data.path or experiment.data.name}: {pairs.summary}",
        "steps": total_steps(experiment.orpo, len(pairs.train)),
    }


def _check_compiler() -> None:
    try:
        torch.compile(torch.sin)(torch.ones(2))
    except Exception as error:  # every backend has errors of its own
        raise ConfigError(
            "launcher.compile=true needs a compiler that torch.compile can use (g++ on a processor, Triton on a GPU), but "
            f"a first function could not be compiled: {(str(error) or repr(error)).splitlines()[0]} Install one, or leave "
            "launcher.compile=false."
        ) from error


def _describe_sae(site: dict[str, Any], sae: FrozenSae) -> str:
    words = f"layer {site['layer']}, {sae.d_sae} latents ({describe(site)})"
    quality = sae.sae.cfg.metadata.get("quality")
    if quality:
        words += f", variance explained {1 - quality['fvu']:.2f}, L0 {quality['l0']:.0f}"
    return words


def main() -> int:
    """Read the experiment from standard input, write the answer as the last line of standard output."""
    try:
        answer: dict[str, Any] = {"ok": prepare(from_mapping(Experiment, json.load(sys.stdin), ""))}
    except IsaerftError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
