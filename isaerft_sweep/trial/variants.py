"""What a finished trial's adapter does at other strengths, and what each of its largest latents does.

The orchestrator has no torch, so it runs ``python -m isaerft_sweep.trial.variants < request.json``. The request is a JSON
object with the arguments of ``analyse``; the output's last line is ``{"ok": result}`` or ``{"error": message}``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import peft
from datasets import Dataset
from safetensors.torch import load_file

from isaerft_sweep.adapter.strength import changed, largest_latents, latent_parameters, set_strength
from isaerft_sweep.errors import IsaerftError, ModelError
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.models.loading import load, sharing_weights, without_dropout
from isaerft_sweep.specs import Experiment
from isaerft_sweep.trial.attach import attach_adapter
from isaerft_sweep.trial.cobatch.run_passes import run_alone
from isaerft_sweep.trial.data import load_pairs
from isaerft_sweep.trial.exact import Optimizations
from isaerft_sweep.trial.forward.strategy import ForwardStrategy
from isaerft_sweep.trial.forward.upper_layers import UpperLayers
from isaerft_sweep.trial.harm import HarmProbe, measure_baseline, measure_harm, read_neutral
from isaerft_sweep.trial.process_cache import ProcessCache, exact_optimizations, store_activations
from isaerft_sweep.trial.recorder import Recorder
from isaerft_sweep.trial.train_loop import HeldOut, PassContext, TrainLoop

Evaluate = Callable[[], dict[str, float]]


def analyse(folder: str, strengths: Sequence[float], latents: int) -> dict[str, Any]:
    """Evaluate the adapter of a finished trial on its held-out pairs: gain and harm in each case.

    Args:
        folder: the trial's.
        strengths: multiples of the adapter's change.
        latents: how many of the latents with the longest part in the change are switched off, and kept alone.

    Returns ``strengths``, a list of {strength, metrics}, and ``latents``, a list of {layer, latent, value, without, alone}.
    """
    trial = TrialFolder(Path(folder))
    experiment = trial.read_spec().experiment
    if experiment.adapter.kind == "prompt":
        raise ModelError("analyze evaluates an adapter at other strengths, but adapter.kind=prompt is a text without one.")
    loaded = without_dropout(load(experiment.model, experiment.cache))
    own = replace(loaded, model=sharing_weights(loaded.model))
    model = attach_adapter(own, experiment.adapter, experiment.orpo.seed, experiment.model.revision)
    peft.set_peft_model_state_dict(model, load_file(trial.adapter / "adapter_model.safetensors"))
    pairs = load_pairs(experiment.data, loaded.tokenizer, experiment.orpo.max_length)
    neutral = read_neutral(experiment.data.neutral_path, loaded.tokenizer, experiment.orpo.max_length)
    pad = int(loaded.tokenizer.pad_token_id)
    with tempfile.TemporaryDirectory() as aside:
        loop = TrainLoop(experiment.orpo, model, pairs, pad, cast(Recorder, _Silent()), Path(aside))
        optimizations = exact_optimizations(experiment, loaded, ProcessCache())
        sequences = loop.texts(neutral, trains=False)
        stored = store_activations(sequences, experiment, model, optimizations)
        with UpperLayers(model, stored).replaced() if stored else nullcontext() as above:
            evaluate = _evaluation(experiment, model, loop, (pairs.evaluation, neutral, pad), optimizations, above)
            return {"strengths": _at_strengths(model, strengths, evaluate), "latents": _of_latents(model, latents, evaluate)}


class _Silent:
    """In a recorder's place: nothing is recorded."""

    def evaluating(self, step: int, done: int, batches: int) -> None:
        """Called during an evaluation."""


def _evaluation(
    experiment: Experiment,
    model: peft.PeftModel,
    loop: TrainLoop,
    texts: tuple[Dataset, list[list[int]], int],
    optimizations: Optimizations,
    above: UpperLayers | None,
) -> Evaluate:
    """Measures the model as it is: the metrics of an evaluation, by their names in W&B."""
    held_out, neutral, pad = texts
    strategy = ForwardStrategy(above, optimizations.share_prompts, optimizations.lean_logits)
    probe = HarmProbe(held_out, neutral, pad, experiment.orpo.eval_batch_size)
    baseline = measure_baseline(model, probe, strategy)
    context = PassContext(strategy, HeldOut(held_out, held_out.select([])))

    def evaluate() -> dict[str, float]:
        metrics, _ = run_alone(loop.measured(held_out, 0, context))
        metrics |= measure_harm(model, probe, strategy, baseline)
        return {f"eval/{name}": value for name, value in metrics.items()}

    return evaluate


def _at_strengths(model: peft.PeftModel, strengths: Sequence[float], evaluate: Evaluate) -> list[dict[str, Any]]:
    rows = []
    for strength in strengths:
        with changed(model):
            set_strength(model, strength)
            rows.append({"strength": strength, "metrics": evaluate()})
    return rows


def _of_latents(model: peft.PeftModel, count: int, evaluate: Evaluate) -> list[dict[str, Any]]:
    rows = []
    for latent in largest_latents(model, count):
        row: dict[str, Any] = {"layer": latent.layer, "latent": latent.number, "value": latent.value}
        with changed(model):
            latent.switch_off()
            row["without"] = evaluate()
        with changed(model):
            latent.keep_alone(latent_parameters(model))
            row["alone"] = evaluate()
        rows.append(row)
    return rows


def main() -> int:
    """Answer one request."""
    request = json.load(sys.stdin)
    try:
        reply: dict[str, Any] = {"ok": analyse(**request)}
    except IsaerftError as error:
        reply = {"error": str(error)}
    print(json.dumps(reply), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
