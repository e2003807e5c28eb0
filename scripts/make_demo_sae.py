"""Makes the demo's SAE: a BatchTopK SAE on SmolLM2-135M-Instruct's residual stream, trained by sae_lens on real text.

    python scripts/make_demo_sae.py --layer 24 --out isaerft_sweep/assets/sae/smollm2-135m-instruct-layer24-2k

The text is English prose that every Python has: the language reference in ``pydoc_data`` and the long descriptions of
the installed packages; ``--text`` takes other files. Takes two to four minutes on 2 CPU cores. Prints on unseen text:
FVU (fraction of variance unexplained), L0 (active latents per token) and the share of the cross-entropy recovered.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pydoc_data.topics
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file

from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.models.loading import LoadedModel, load
from isaerft_sweep.specs import ModelSpec

MODEL = ModelSpec(name="HuggingFaceTB/SmolLM2-135M-Instruct", source="package", dtype="float32")
CONTEXT = 128
NORM_CUT = 3.0
"""Tokens above this many times the median norm (attention sinks) are left out: they would swallow the loss."""


def prose(files: list[Path]) -> str:
    """Training text: the given files, else the text that comes with Python and its packages."""
    if files:
        return "\n\n".join(f.read_text(encoding="utf-8") for f in files)
    parts = list(pydoc_data.topics.topics.values())
    parts += [str(d.metadata.get_payload() or "") for d in importlib.metadata.distributions()]
    random.Random(0).shuffle(parts)
    return "\n\n".join(parts)


@torch.no_grad()
def activations(loaded: LoadedModel, layer: int, text: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual stream after ``layer`` [N, d_in] without sinks, and the token windows [W, CONTEXT] it came from."""
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"][0][: tokens + CONTEXT]
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    kept: list[torch.Tensor] = []
    hook = decoder_layers(loaded.model)[layer].register_forward_hook(
        lambda _m, _i, out: kept.append((out[0] if isinstance(out, tuple) else out)[:, 1:].reshape(-1, out.shape[-1]))
    )
    for batch in windows.split(16):
        loaded.model.model(batch)
    hook.remove()
    found = torch.cat(kept)
    norms = found.norm(dim=-1)
    return found[norms < NORM_CUT * norms.median()], windows


def batches(found: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Endless shuffled batches [size, d_in]."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for index in torch.randperm(len(found), generator=generator).split(size):
            if len(index) == size:
                yield found[index]


def train(found: torch.Tensor, args: argparse.Namespace) -> BatchTopKTrainingSAE:
    """A BatchTopK SAE fitted to ``found`` [N, d_in]; the activation scale is folded into its weights."""
    site = {"model_name": MODEL.name, "hook_name": f"blocks.{args.layer}.hook_resid_post", "context_size": CONTEXT}
    config = BatchTopKTrainingSAEConfig(
        d_in=found.shape[1],
        d_sae=args.latents,
        k=args.active,
        normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(**site),
    )
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=args.samples,
            train_batch_size_samples=1024,
            lr=8e-4,
            lr_end=0.0,
            lr_warm_up_steps=30,
            lr_decay_steps=args.samples // 1024 // 3,
            n_batches_for_norm_estimate=20,
            dead_feature_window=100,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        BatchTopKTrainingSAE(config),
        batches(found, 1024),
    )
    return trainer.fit()


def halve(folder: Path) -> None:
    """Store the weights as float16: half the size, and far below the SAE's own error. They load as float32."""
    weights = folder / "sae_weights.safetensors"
    save_file({k: v.half().contiguous() for k, v in load_file(weights).items()}, weights)


@torch.no_grad()
def quality(loaded: LoadedModel, sae: SAE, layer: int, found: torch.Tensor, windows: torch.Tensor) -> dict[str, float]:
    """FVU, L0 and cross-entropy recovered (1: as good as the untouched stream, 0: as bad as zeros) on unseen text."""
    latents = sae.encode(found)
    error = (sae.decode(latents) - found).pow(2).sum() / (found - found.mean(0)).pow(2).sum()

    def loss(edit) -> float:  # type: ignore[no-untyped-def]
        def hook(_module, _inputs, out):  # type: ignore[no-untyped-def]
            return torch.cat([out[:, :1], edit(out[:, 1:])], dim=1)  # position 0 is a sink: left as it is

        handle = decoder_layers(loaded.model)[layer].register_forward_hook(hook)
        value = loaded.model(windows, labels=windows).loss.item()
        handle.remove()
        return value

    clean, replaced, zeroed = loss(lambda x: x), loss(lambda x: sae.decode(sae.encode(x))), loss(torch.zeros_like)
    return {
        "fvu": round(error.item(), 4),
        "l0": round((latents > 0).float().sum(-1).mean().item(), 1),
        "cross_entropy_recovered": round((zeroed - replaced) / (zeroed - clean), 4),
        "unseen_tokens": found.shape[0],
    }


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=24)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--latents", type=int, default=2048)
    parser.add_argument("--active", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=250_000)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    torch.manual_seed(0)
    loaded = load(MODEL, None)
    text = prose(args.text)
    cut = int(len(text) * 0.98)
    found, _ = activations(loaded, args.layer, text[:cut], args.tokens)
    unseen, windows = activations(loaded, args.layer, text[cut:], 8_000)
    print(f"{len(found):,} tokens to train on, {len(unseen):,} unseen, d_in {found.shape[1]}", flush=True)
    train(found, args).save_inference_model(args.out)
    halve(args.out)
    sae = SAE.load_from_disk(args.out, dtype="float32")
    measured = quality(loaded, sae, args.layer, unseen, windows[:32])
    config_file = args.out / "cfg.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["metadata"]["quality"] = measured
    config_file.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
