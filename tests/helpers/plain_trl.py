"""What a user would write today: TRL's trainers on a model with a forward hook from the adapter's formula; nothing of our loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import TrainerCallback, set_seed

from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.adapter.sae import load_sae
from isaerft_sweep.models.loading import load, without_dropout
from isaerft_sweep.spec_fields import to_dict
from isaerft_sweep.specs import Experiment, OrpoSpec
from isaerft_sweep.trial.data import Pairs, load_pairs


class Collect(TrainerCallback):
    """Every row that a trainer logs, with its step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "train_runtime" not in logs:
            self.rows.append({"step": state.global_step, **logs})


def adapted_model(experiment: Experiment) -> Any:
    """The loaded model with the adapter as a user would write it, in the simplest way."""
    kind, loaded = experiment.adapter.kind, without_dropout(load(experiment.model, None))
    layer_number = experiment.adapter.sites[0].layer
    if kind == "lora":
        return replace(loaded, model=_with_lora(loaded.model, layer_number, experiment))
    if kind in ("vector", "loreft"):
        _change_stream(decoder_layers(loaded.model)[layer_number], loaded.model.config.hidden_size, experiment)
        return loaded
    return _steered(loaded, experiment)


def _with_lora(model: Any, hook_layer: int, experiment: Experiment) -> Any:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rank = experiment.adapter.rank or 8
    above = list(range(hook_layer + 1, len(decoder_layers(model))))
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=names, layers_to_transform=above, task_type="CAUSAL_LM"
    )
    set_seed(experiment.orpo.seed)
    return peft.get_peft_model(model, config)


def _change_stream(layer: torch.nn.Module, width: int, experiment: Experiment) -> None:
    """x + b, or LoReFT with the initial weights of equation 2 that leave x as it is."""
    set_seed(experiment.orpo.seed)
    if experiment.adapter.kind == "vector":
        layer.register_parameter("steering", torch.nn.Parameter(torch.zeros(width)))
    else:
        rank = experiment.adapter.rank or 4
        free = torch.linalg.qr(torch.randn(width, rank)).Q
        layer.register_parameter("free", torch.nn.Parameter(free))
        layer.register_parameter("weight", torch.nn.Parameter(_orthonormal(free).clone()))
        layer.register_parameter("offset", torch.nn.Parameter(torch.zeros(rank)))

    def hook(module: Any, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        if experiment.adapter.kind == "vector":
            x = x + module.steering
        else:
            rows = _orthonormal(module.free)
            x = x + (x @ module.weight.T + module.offset - x @ rows.T) @ rows
        return (x, *output[1:]) if isinstance(output, tuple) else x

    layer.register_forward_hook(hook)


def _orthonormal(free: torch.Tensor) -> torch.Tensor:
    """Gram and Schmidt's rows [rank, width] of ``free`` [width, rank]."""
    rows: list[torch.Tensor] = []
    for column in free.T:
        for row in rows:
            column = column - (column @ row) * row
        rows.append(column / column.norm())
    return torch.stack(rows)


def _steered(loaded: Any, experiment: Experiment) -> Any:
    """A trainable vector on the latents: f + b, or f · (1 + b)."""
    site = to_dict(experiment.adapter.sites[0])
    sae = load_sae({key: value for key, value in site.items() if value is not None}).sae
    layer = decoder_layers(loaded.model)[site["layer"]]
    layer.register_parameter("steering", torch.nn.Parameter(torch.zeros(sae.cfg.d_sae)))

    def hook(module: Any, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        f = sae.encode(x)
        changed = f + module.steering if experiment.adapter.kind == "bias" else f * (1 + module.steering)
        x = x + (sae.decode(changed) - sae.decode(f)).to(x.dtype)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    layer.register_forward_hook(hook)
    return loaded


def trl_arguments(config: Any, orpo: OrpoSpec, output: Path, **more: Any) -> Any:
    """TRL's config with the settings of ``orpo``."""
    return config(
        output_dir=str(output), learning_rate=orpo.learning_rate, beta=orpo.beta, max_length=orpo.max_length,
        max_steps=orpo.max_steps, num_train_epochs=orpo.epochs, per_device_train_batch_size=orpo.batch_size,
        per_device_eval_batch_size=orpo.eval_batch_size, gradient_accumulation_steps=orpo.gradient_accumulation,
        warmup_steps=orpo.warmup_steps, lr_scheduler_type=orpo.schedule, optim="adamw_torch", weight_decay=orpo.weight_decay,
        seed=orpo.seed, logging_steps=1, eval_strategy="steps", eval_steps=orpo.max_steps if orpo.max_steps > 0 else 1000,
        save_strategy="no", report_to=[], bf16=False, gradient_checkpointing=False, use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, **more,
    )  # fmt: skip


def orpo_rows(experiment: Experiment, output: Path) -> list[dict[str, float]]:
    """What TRL's ORPOTrainer logs for the experiment."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return trained_rows(ORPOTrainer, ORPOConfig, experiment, output)


def trained_rows(trainer: Any, config: Any, experiment: Experiment, output: Path, **more: Any) -> list[dict[str, float]]:
    """What a TRL trainer logs for the experiment; ``more``: of its config."""
    loaded, seen = adapted_model(experiment), Collect()
    pairs: Pairs = load_pairs(experiment.data, loaded.tokenizer, experiment.orpo.max_length)
    trainer(
        model=loaded.model, args=trl_arguments(config, experiment.orpo, output, **more), train_dataset=pairs.train,
        eval_dataset=pairs.evaluation, processing_class=loaded.tokenizer, callbacks=[seen],
    ).train()  # fmt: skip
    return seen.rows
