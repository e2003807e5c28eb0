"""One trial as a user would write it today: TRL's ORPOTrainer on the model with a small wrapper at the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def run_plain(experiment: Any, folder: Path, vector: bool) -> dict[str, float]:
    """Train and evaluate; ``vector``: the adapter is x + b @ W_dec, else SAE encode, decode and error term."""
    import torch
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    import isaerft_sweep.trial  # noqa: F401
    from isaerft_sweep.adapter.architecture import decoder_layers
    from isaerft_sweep.adapter.sae import load_sae
    from isaerft_sweep.models.loading import load
    from isaerft_sweep.spec_fields import to_dict
    from isaerft_sweep.trial.data import load_pairs

    class Steered(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module, sae: Any) -> None:
            super().__init__()
            self.layer, self.sae = layer, (sae,)
            self.bias = torch.nn.Parameter(torch.zeros(sae.cfg.d_sae))

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            x, sae = self.layer(*args, **kwargs), self.sae[0]
            if vector:
                return x + self.bias @ sae.W_dec
            latents = sae.encode(x)
            return x + sae.decode(latents + self.bias) - sae.decode(latents)

    orpo, loaded = experiment.orpo, load(experiment.model, None)
    pairs = load_pairs(experiment.data, loaded.tokenizer, orpo.max_length)
    site = to_dict(experiment.adapter.sites[0])
    layers = decoder_layers(loaded.model)
    layers[site["layer"]] = Steered(layers[site["layer"]], load_sae(site).sae)
    args = ORPOConfig(
        output_dir=str(folder),
        learning_rate=orpo.learning_rate,
        beta=orpo.beta,
        max_length=orpo.max_length,
        max_steps=orpo.max_steps,
        per_device_train_batch_size=orpo.batch_size,
        per_device_eval_batch_size=orpo.eval_batch_size,
        gradient_accumulation_steps=orpo.gradient_accumulation,
        warmup_steps=orpo.warmup_steps,
        lr_scheduler_type=orpo.schedule,
        optim="adamw_torch",
        seed=orpo.seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,  # the model is loaded in the dtype it computes in, as ours
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = ORPOTrainer(
        model=loaded.model,
        args=args,
        train_dataset=pairs.train,
        eval_dataset=pairs.evaluation,
        processing_class=loaded.tokenizer,
    )
    trainer.train()
    found = trainer.evaluate()
    return {"log_odds": found["eval_log_odds_chosen"], "nll": found["eval_nll_loss"]}
