"""A trial has the numbers of TRL's ORPOTrainer, at every level of reuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.plain_trl import orpo_rows
from helpers.trials import OFF, Made, rows_of
from transformers import AutoConfig, AutoModelForCausalLM

from isaerft_sweep.models.loading import load, without_dropout
from isaerft_sweep.specs import Experiment
from isaerft_sweep.trial.runner import run_trial

PADDED = re.compile(r"logits/")
"""TRL's means of all logits include those at padding and elsewhere that no loss reads; we do not compute them."""


BOUNDS = {"float32": {"rel": 2e-4, "abs": 2e-5}, "bfloat16": {"abs": 3 * 2**-5}}
"""TRL takes means and differences of log-probabilities in the model's own type: bfloat16's steps are 2^-5 between 4 and 8."""


GRADIENTS = {"float32": 1e-3, "bfloat16": 0.1}
"""How far the gradients of a step may be apart, relative to their size; from the second step on the adapters differ too."""


LEVELS = {
    "whole": (0, False, False),
    "activation cache": (1, False, False),
    "logits": (0, True, False),
    "prompts": (0, True, True),
    "all": (1, True, True),
}
"""Activation cache, lean logits, shared prompts."""
FAMILIES = ["llama", "gemma2", "gemma3_text", "qwen2", "qwen3", "gpt_neox"]


@pytest.mark.parametrize(
    ("family", "dtype", "kind"),
    [
        *((family, "float32", "bias") for family in FAMILIES),
        ("llama", "bfloat16", "bias"),
        ("gemma2", "float32", "scale"),
        *(("llama", "float32", kind) for kind in ("vector", "lora", "loreft")),
    ],
)
@pytest.mark.slow
def test_the_numbers_are_trls(
    family: str, dtype: str, kind: str, trial: Made, tmp_path: Path, gradients: list[torch.Tensor]
) -> None:
    """At every level of reuse, gradients too."""
    theirs: list[dict[str, float]] = []
    expected: list[torch.Tensor] = []
    for level, (cache_gb, lean, prompts) in LEVELS.items():
        folder = trial(
            *OFF,
            f"model.architecture={family}",
            f"model.dtype={dtype}",
            f"launcher.activation_cache_gb={cache_gb}",
            f"launcher.lean_logits={lean}",
            f"launcher.share_prompts={prompts}",
            f"adapter={kind}",
            "orpo.eval_untrained=never",
            name=level.replace(" ", "-"),
        )
        gradients.clear()
        assert run_trial(folder, 1) == "completed"
        given = list(gradients)
        if not theirs:
            gradients.clear()
            theirs = orpo_rows(folder.read_spec().experiment, tmp_path / "trl")
            expected = list(gradients)
        assert len(given) == len(expected) == 4
        for mine, plain in zip(given, expected, strict=True):
            assert float((mine - plain).norm() / plain.norm()) < GRADIENTS[dtype], level
        ours = rows_of(folder)
        assert len(ours) == len(theirs) == 5
        for mine, plain in zip(ours, theirs, strict=True):
            compared = 0
            for key, value in plain.items():
                name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
                rounded_to_ties = dtype == "bfloat16" and name.endswith("accuracies")
                if name in mine and not rounded_to_ties and not PADDED.search(name):
                    bound = {"rel": 2e-2} if name.endswith("grad_norm") and dtype == "bfloat16" else BOUNDS[dtype]
                    assert mine[name] == pytest.approx(value, **bound), (level, mine["step"], name)
                    compared += 1
            assert compared >= 10


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64, "dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
        ("gpt_neox", {"intermediate_size": 64, "hidden_dropout": 0.5, "attention_dropout": 0.5}),
        ("falcon", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
        ("llama", {"intermediate_size": 64, "attention_dropout": 0.5}),
    ],
)
def test_no_kind_of_dropout_is_left(
    family: str, options: dict[str, Any], experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    spec = experiment("model=tiny").model
    load(spec, None).tokenizer.save_pretrained(tmp_path)
    config = AutoConfig.for_model(
        family, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=262, **options
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    spec = replace(spec, name=str(tmp_path), source="hub", architecture=None, attention="eager")
    model = without_dropout(load(spec, None)).model.train()
    ids = torch.arange(6, 40)[None]
    torch.testing.assert_close(model(ids).logits, model(ids).logits, rtol=0, atol=0)
