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
from isaerft_sweep.journal.folders import TrialFolder
from isaerft_sweep.models.loading import load, without_dropout
from isaerft_sweep.plain import to_dict
from isaerft_sweep.specs import Experiment
from isaerft_sweep.trial.data import load_pairs
from isaerft_sweep.trial.run import run_trial

PADDED = re.compile(r"logits/")
"""TRL's means of all logits include those at padding and elsewhere that no loss reads; we do not compute them."""


BOUNDS = {"float32": {"rel": 2e-4, "abs": 2e-5}, "bfloat16": {"abs": 3 * 2**-5}}
"""TRL takes means and differences of log-probabilities in the model's own type: bfloat16's steps are 2^-5 between 4 and 8."""


class Collect(TrainerCallback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.rows.append({"step": state.global_step, **logs})


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
            return x + (sae.decode(f + self.bias) - sae.decode(f)).to(x.dtype)

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


LEVELS = {"whole": (0, False), "trunk": (1, False), "logits": (0, True), "trunk and logits": (1, True)}
FAMILIES = ["llama", "gemma2", "gemma3_text", "qwen2", "qwen3", "gpt_neox"]


@pytest.mark.parametrize(("family", "dtype"), [*((family, "float32") for family in FAMILIES), ("llama", "bfloat16")])
@pytest.mark.slow
def test_the_numbers_are_trls(family: str, dtype: str, trial: Made, tmp_path: Path) -> None:
    """At every level of reuse."""
    theirs: list[dict[str, float]] = []
    for level, (trunk_gb, lean) in LEVELS.items():
        folder = trial(
            *OFF,
            f"model.architecture={family}",
            f"model.dtype={dtype}",
            f"launcher.trunk_cache_gb={trunk_gb}",
            f"launcher.lean_logits={lean}",
            "orpo.eval_untrained=never",
            name=level.replace(" ", "-"),
        )
        assert run_trial(folder, 1) == "completed"
        theirs = theirs or [row for row in as_a_user_would(folder, tmp_path / "trl") if "train_runtime" not in row]
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
