"""The optimiser and its schedule, as transformers' Trainer makes them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from isaerft_sweep.specs import OrpoSpec

OPTIMIZERS = tuple(member.value for member in OptimizerNames)
NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|[._])norm(?:$|\.)")
"""Names of parameters without weight decay, as in transformers."""


def make_optimizer(spec: OrpoSpec, model: nn.Module, folder: Path) -> torch.optim.Optimizer:
    """The optimiser of the model's trained parameters. ``folder``: of the checkpoints; transformers requires it."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        optim=resolve_optimizer(spec.optimizer),
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
    )
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if not NOT_DECAYED.search(name)]
    others = [parameter for name, parameter in trained if NOT_DECAYED.search(name)]
    groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **options)
    return optimizer


def make_schedule(spec: OrpoSpec, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The learning rate schedule over ``steps`` optimiser steps."""
    return get_scheduler(spec.schedule, optimizer, num_warmup_steps=spec.warmup_steps, num_training_steps=steps)


def resolve_optimizer(name: str) -> str:
    """Resolve ``auto`` as in the published run: paged 8-bit AdamW on a GPU with bitsandbytes, torch's AdamW elsewhere."""
    if name != "auto":
        return name
    eight_bit = torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes") is not None
    if torch.cuda.is_available() and not eight_bit:
        print("orpo.optimizer=auto: bitsandbytes (extra `gpu`) is not installed, so torch's AdamW is used", flush=True)
    return "paged_adamw_8bit" if eight_bit else "adamw_torch"
