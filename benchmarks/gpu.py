"""What a GPU gives: a trial's numbers against the plain formula, and the time of its steps level by level.

    python benchmarks/gpu.py [--out gpu.json] [--steps 3] [--tiny]

One command, a few minutes, no network: a model of Gemma-2-2B's shape with random weights in bfloat16, a bias on 16,384
random directions at layer 20, batches of 2 pairs, 8 of them a step, lengths as in UltraFeedback (mean 350 tokens, at most
1,024). It needs torch, transformers, peft and what these need, not the package's other dependencies; run it from the
repository. ``--tiny`` runs the same on small shapes, on any machine.

    numbers  log-probabilities and gradient in float32 and bfloat16, each level beside the plain model with a hook
    a step   plain: all logits in float32, as TRL's trainers do; ours: lean logits, shared prompts, stored frozen layers
    passes   1, 2, 4, 8 trials in one forward and backward pass
    head     the head's forward and backward alone
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from transformers import AutoConfig, AutoModelForCausalLM

from isaerft_sweep.adapter import IsaerftConfig
from isaerft_sweep.adapter import model as adapter_model
from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.adapter.sae import FrozenSae
from isaerft_sweep.models.loading import sharing_weights
from isaerft_sweep.specs import OrpoSpec
from isaerft_sweep.trial.cobatch.multi_trial import MultiTrialModel
from isaerft_sweep.trial.cobatch.passes import ForwardPass
from isaerft_sweep.trial.forward.activation_cache import StoredActivations, places_of
from isaerft_sweep.trial.forward.frozen_prefix import streams_of
from isaerft_sweep.trial.forward.head import model_head, token_logps
from isaerft_sweep.trial.forward.strategy import ForwardStrategy
from isaerft_sweep.trial.forward.upper_layers import UpperLayers
from isaerft_sweep.trial.losses import make_loss
from isaerft_sweep.trial.pair_batch import PairBatch, pair_batch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPEC = OrpoSpec(learning_rate=1e-3, beta=0.2)


@dataclass(frozen=True)
class Shape:
    """Sizes of model, adapter and batches."""

    config: dict[str, int]
    layer: int
    latents: int
    mean_tokens: int
    max_tokens: int
    accumulation: int = 8
    pairs: int = 2


WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256}
NARROW = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}
GEMMA = Shape(
    {"vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, **WIDE},
    20,
    16_384,
    350,
    1024,
)
TINY = Shape(
    {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, **NARROW}, 2, 256, 40, 90
)


def make_model(shape: Shape, dtype: torch.dtype) -> tuple[Any, peft.PeftModel]:
    """The base model with random weights, and the same weights with a bias on random directions."""
    config = AutoConfig.for_model("gemma2", **shape.config, max_position_embeddings=4096, sliding_window=4096)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    with DEVICE:
        base = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    decoder = (
        torch.randn(shape.latents, shape.config["hidden_size"], generator=generator) / shape.config["hidden_size"] ** 0.5
    )
    directions = FrozenSae(None, decoder.to(DEVICE), "", basis="random")
    adapter_model.load_basis = lambda *_args: directions  # sae_lens is not needed for a bias: its decoder is all that counts
    site = {"layer": shape.layer, "sae_release": "isaerft-sweep", "sae_id": "random"}
    adapted = peft.get_peft_model(sharing_weights(base), IsaerftConfig(sites=[site], kind="random"))
    bias_of(adapted).data = 0.05 * torch.randn(shape.latents, generator=generator).to(DEVICE)
    return base, adapted


def bias_of(model: peft.PeftModel) -> torch.nn.Parameter:
    """The trained vector."""
    return next(parameter for parameter in model.parameters() if parameter.requires_grad)


def make_batches(shape: Shape, seed: int = 0) -> list[PairBatch]:
    """The batches of one optimiser step."""
    rng = np.random.default_rng(seed)
    vocabulary = shape.config["vocab_size"]

    def tokens(count: int) -> list[int]:
        return list(map(int, rng.integers(5, vocabulary, count)))

    batches = []
    for _ in range(shape.accumulation):
        rows: dict[str, list[Any]] = {
            f"{side}_{what}": [] for side in ("chosen", "rejected") for what in ("ids", "prompt_length")
        }
        for _ in range(shape.pairs):
            length = int(np.clip(rng.lognormal(np.log(shape.mean_tokens) - 0.18, 0.6), 16, shape.max_tokens))
            prompt = tokens(max(4, length // 3))
            for side in ("chosen", "rejected"):
                answer = tokens(max(4, int((length - len(prompt)) * rng.uniform(0.7, 1.3))))
                rows[f"{side}_ids"].append([*prompt, *answer][: shape.max_tokens])
                rows[f"{side}_prompt_length"].append(len(prompt))
        batches.append(pair_batch(rows, 0, DEVICE, read_prompt=True))
    return batches


def plain_logps(model: Any, batch: PairBatch) -> torch.Tensor:
    """What a user writes today: all logits, in float32."""
    logits = model(batch.batch.ids, attention_mask=batch.batch.mask, use_cache=False).logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(-1, batch.batch.ids[:, 1:, None])[..., 0]
    return logps[batch.batch.read]


@contextmanager
def hooked(base: Any, adapted: peft.PeftModel, layer: int) -> Iterator[Any]:
    """The base model with x + b @ W_dec by a forward hook."""
    vectors = decoder_layers(adapted.get_base_model())[layer]

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        changed = x + (bias_of(adapted) @ vectors.decoder("default")).to(x.dtype)  # type: ignore[operator]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = decoder_layers(base)[layer].register_forward_hook(hook)
    try:
        yield base
    finally:
        handle.remove()


def stored(base: Any, shape: Shape, batches: list[PairBatch]) -> StoredActivations:
    """The output of the layers up to the hook point for every sequence."""
    sequences = [ids[kept.bool()].tolist() for b in batches for ids, kept in zip(b.batch.ids, b.batch.mask, strict=True)]
    distinct = [list(s) for s in {tuple(s): None for s in sequences}]
    streams = dict(streams_of(base, decoder_layers(base)[shape.layer], distinct, True))
    values = torch.cat([streams[number] for number in range(len(distinct))]).cpu().contiguous()
    raw = values.view(torch.uint16) if values.dtype == torch.bfloat16 else values
    return StoredActivations(np.asarray(raw.numpy()), places_of(distinct), values.dtype)


Logps = Callable[[PairBatch], torch.Tensor]


@contextmanager
def levels(base: Any, adapted: peft.PeftModel, shape: Shape, batches: list[PairBatch], name: str) -> Iterator[Logps]:
    """How one level computes the log-probabilities of a batch."""
    if name == "plain hook":
        with hooked(base, adapted, shape.layer) as model:
            yield lambda batch: plain_logps(model, batch)
        return
    above = UpperLayers(adapted, stored(base, shape, batches)).replaced() if "stored" in name else nullcontext()
    with above as upper:
        strategy = ForwardStrategy(upper, share_prompts="shared" in name, lean=True)
        yield lambda batch: strategy.forward(adapted.get_base_model(), batch.batch).logps  # type: ignore[arg-type]


LEVELS = ("plain hook", "lean logits", "lean, shared prompts", "lean, shared prompts, stored layers")


def step(logps: Logps, batches: list[PairBatch]) -> float:
    """Forward and backward of one optimiser step; its loss."""
    loss_of, total = make_loss(SPEC), 0.0
    for batch in batches:
        loss = loss_of(batch.pair_logps(logps(batch))) / len(batches)
        loss.backward()
        total += float(loss.detach())
    return total


def synchronise() -> None:
    """Wait for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def measure(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Wall and processor seconds of a call, the median, after a first one; the device's peak memory, GiB."""
    run()
    synchronise()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    walls, processors = [], []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        run()
        synchronise()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0
    return {"wall_s": float(np.median(walls)), "processor_s": float(np.median(processors)), "peak_gib": peak}


def numbers(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Relative errors of loss and gradient of each level, beside the plain hook in the same type and in float32."""
    base, adapted = make_model(TINY, dtype)
    batches, rows, expected = make_batches(TINY), [], None
    for name in LEVELS:
        bias_of(adapted).grad = None
        with levels(base, adapted, TINY, batches, name) as logps:
            loss = step(logps, batches)
        gradient = bias_of(adapted).grad
        assert gradient is not None
        if expected is None:
            expected = loss, gradient.clone()
        error = float((gradient - expected[1]).norm() / expected[1].norm())
        rows.append(
            {
                "type": str(dtype),
                "level": name,
                "loss": loss,
                "loss_error": abs(loss / expected[0] - 1),
                "gradient_error": error,
            }
        )
    return rows


def steps(shape: Shape, repeats: int) -> list[dict[str, Any]]:
    """The time of an optimiser step, level by level, and of several trials in one pass."""
    base, adapted = make_model(shape, torch.bfloat16)
    batches, rows = make_batches(shape), []
    tokens = sum(batch.tokens for batch in batches)
    for name in LEVELS:
        with levels(base, adapted, shape, batches, name) as logps:
            measured = measure(lambda logps=logps: step(logps, batches), repeats)  # type: ignore[misc]
        rows.append({"level": name, "tokens_per_s": tokens / measured["wall_s"], **measured})
    with UpperLayers(adapted, stored(base, shape, batches)).replaced() as above:
        strategy = ForwardStrategy(above, share_prompts=True, lean=True, base=base)
        joint = MultiTrialModel(base, shape.layer)
        for trials in (1, 2, 4, 8):
            parts = [ForwardPass(adapted.get_base_model(), batches[0].batch, strategy, True)] * trials

            def one_pass(parts: list[ForwardPass] = parts) -> None:
                torch.autograd.backward([outputs.logps.sum() for outputs in joint.forward(parts)])

            measured = measure(one_pass, repeats)
            rate = trials * batches[0].tokens / measured["wall_s"]
            rows.append({"level": f"{trials} trials a pass, one batch", "tokens_per_s": rate, **measured})
    hidden = torch.randn(
        tokens // len(batches), shape.config["hidden_size"], device=DEVICE, dtype=torch.bfloat16
    ).requires_grad_()
    targets = torch.randint(0, shape.config["vocab_size"], (len(hidden),), device=DEVICE)
    head = model_head(base)
    measured = measure(lambda: token_logps(hidden, targets, head)[0].sum().backward(), repeats)
    rows.append({"level": "the head alone, one batch", "tokens_per_s": len(hidden) / measured["wall_s"], **measured})
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run everything, print it, write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed, after a first one")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for any machine")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about itself
    begun = time.perf_counter()
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    exact = [row for dtype in (torch.float32, torch.bfloat16) for row in numbers(dtype)]
    print(f"{card}, torch {torch.__version__}\n\n{as_table(exact)}\n", flush=True)
    timed = steps(TINY if options.tiny else GEMMA, options.steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{as_table(timed)}\n\n{time.perf_counter() - begun:.0f} s, {peak:.1f} GiB of host memory", flush=True)
    if options.out:
        options.out.write_text(
            json.dumps({"card": card, "torch": torch.__version__, "numbers": exact, "steps": timed}, indent=1)
        )


if __name__ == "__main__":
    main()
