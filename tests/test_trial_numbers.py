"""A trial has the numbers of TRL's ORPOTrainer, at every level of reuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trial import OFF, Made, rows_of
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.adapter.sae import load_sae
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.models.loading import load, without_dropout
from isaerft_sweep.spec_fields import to_dict
from isaerft_sweep.specs import Experiment
from isaerft_sweep.trial.data import load_pairs
from isaerft_sweep.trial.runner import run_trial

PADDED = re.compile(r"logits/")
"""TRL's means of all logits include those at padding and elsewhere that no loss reads; we do not compute them."""


BOUNDS = {"float32": {"rel": 2e-4, "abs": 2e-5}, "bfloat16": {"abs": 3 * 2**-5}}
"""TRL takes means and differences of log-probabilities in the model's own type: bfloat16's steps are 2^-5 between 4 and 8."""


GRADIENTS = {"float32": 1e-3, "bfloat16": 0.1}
"""How far the gradients of a step may be apart, relative to their size; from the second step on the adapters differ too."""


class Collect(TrainerCallback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.rows.append({"step": state.global_step, **logs})


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What AdamW is given from now on, of all trained parameters in one vector, step by step."""
    seen: list[torch.Tensor] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        found = [
            p.grad.detach().flatten().float().clone()
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        seen.append(torch.cat(found))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    return seen


def as_a_user_would(folder: TrialFolder, output: Path) -> list[dict[str, float]]:
    """TRL's ORPOTrainer on the plain model with a forward hook written from the formula; nothing of our trainer."""
    experiment = folder.read_spec().experiment
    orpo, loaded = experiment.orpo, load(experiment.model, None)
    pairs = load_pairs(experiment.data, loaded.tokenizer, orpo.max_length)
    site = to_dict(experiment.adapter.sites[0])
    sae = load_sae(site).sae

    class Steered(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.layer, self.bias = layer, torch.nn.Parameter(torch.zeros(sae.cfg.d_sae))

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            x = self.layer(*args, **kwargs)
            f = sae.encode(x)
            changed = f + self.bias if experiment.adapter.kind == "bias" else f * (1 + self.bias)
            return x + (sae.decode(changed) - sae.decode(f)).to(x.dtype)

    layers = decoder_layers(loaded.model)
    layers[site["layer"]] = Steered(layers[site["layer"]])
    seen = Collect()
    args = ORPOConfig(
        output_dir=str(output), learning_rate=orpo.learning_rate, beta=orpo.beta, max_length=orpo.max_length,
        max_steps=orpo.max_steps, per_device_train_batch_size=orpo.batch_size, per_device_eval_batch_size=orpo.eval_batch_size,
        gradient_accumulation_steps=orpo.gradient_accumulation, warmup_steps=orpo.warmup_steps, lr_scheduler_type=orpo.schedule,
        optim="adamw_torch", weight_decay=0.0, seed=orpo.seed, logging_steps=1, eval_strategy="steps", eval_steps=orpo.max_steps,
        save_strategy="no", report_to=[], bf16=False, gradient_checkpointing=False, use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    ORPOTrainer(
        model=loaded.model, args=args, train_dataset=pairs.train, eval_dataset=pairs.evaluation,
        processing_class=loaded.tokenizer, callbacks=[seen],
    ).train()  # fmt: skip
    return seen.rows


LEVELS = {
    "whole": (0, False, False),
    "trunk": (1, False, False),
    "logits": (0, True, False),
    "prompts": (0, True, True),
    "all": (1, True, True),
}
"""Reused trunk, lean logits, shared prompts."""
FAMILIES = ["llama", "gemma2", "gemma3_text", "qwen2", "qwen3", "gpt_neox"]


@pytest.mark.parametrize(
    ("family", "dtype", "kind"),
    [*((family, "float32", "bias") for family in FAMILIES), ("llama", "bfloat16", "bias"), ("gemma2", "float32", "scale")],
)
@pytest.mark.slow
def test_the_numbers_are_trls(
    family: str, dtype: str, kind: str, trial: Made, tmp_path: Path, gradients: list[torch.Tensor]
) -> None:
    """At every level of reuse, gradients too."""
    theirs: list[dict[str, float]] = []
    expected: list[torch.Tensor] = []
    for level, (trunk_gb, lean, prompts) in LEVELS.items():
        folder = trial(
            *OFF,
            f"model.architecture={family}",
            f"model.dtype={dtype}",
            f"launcher.activation_cache_gb={trunk_gb}",
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
            theirs = [row for row in as_a_user_would(folder, tmp_path / "trl") if "train_runtime" not in row]
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
                if name in mine and not rounded_to_ties and not ((trunk_gb or lean) and PADDED.search(name)):
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
