"""What a trial records of its adapter and its held-out pairs, and adapters that move few latents."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.trials import OFF, Made
from safetensors.torch import load_file

import isaerft_sweep.trial.train_loop as train_loop
from isaerft_sweep.adapter import load_model
from isaerft_sweep.adapter.sae import load_sae
from isaerft_sweep.errors import ConfigError
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.results.statistics import pair_values
from isaerft_sweep.trial.runner import run_trial

SITE = {"sae_release": "isaerft-sweep", "sae_id": "random-64x256"}


def weights(folder: TrialFolder) -> torch.Tensor:
    (tensor,) = load_file(folder.adapter / "adapter_model.safetensors").values()
    return tensor


def test_pair_scores_are_those_that_the_metrics_are_means_of(trial: Made) -> None:
    folder = trial(*OFF, "data.eval_size=8", "orpo.eval_batch_size=4", "orpo.beta=0.7")
    assert run_trial(folder, 1) == "completed"
    found, metrics = folder.read_evaluation(), folder.read_status().metrics
    assert found["trained"]["step"] == 4 and found["untrained"]["step"] == 0
    assert found["trained"]["pairs"] == found["untrained"]["pairs"] and len(set(found["trained"]["pairs"])) == 8
    chosen, rejected = (np.array(found["trained"][side]) for side in ("chosen", "rejected"))
    assert chosen.mean() == pytest.approx(metrics["eval/logps/chosen"], rel=1e-5)
    assert 0.7 * (chosen - rejected).mean() == pytest.approx(metrics["eval/rewards/margins"], rel=1e-4)
    assert found["trained"]["chosen"] != found["untrained"]["chosen"]


@pytest.mark.parametrize("lean", [True, False])
def test_an_evaluation_does_not_depend_on_its_batches(lean: bool, trial: Made) -> None:
    """Seven pairs at once are TRL's own mean over pairs; in batches of three the last, short one must not count for more."""
    found = []
    for size in (7, 3):
        folder = trial(
            *OFF, "data.eval_size=7", f"orpo.eval_batch_size={size}", f"launcher.lean_logits={lean}", name=f"b{size}"
        )
        assert run_trial(folder, 1) == "completed"
        metrics = folder.read_status().metrics
        scores = folder.read_evaluation()["trained"]
        assert len(scores["pairs"]) == 7
        for name in ("eval/log_odds_chosen", "eval/rewards/accuracies", "eval/rewards/margins", "eval/log_odds_ratio"):
            values = pair_values(name, scores, 1.0)
            assert values is not None and metrics[name] == pytest.approx(values.mean(), abs=1e-6), name
        found.append({name: value for name, value in metrics.items() if name.startswith("eval/") and "logits" not in name})
    assert len(found[0]) >= 10 and found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("lean", [True, False])
def test_tokens_are_counted_also_across_a_stop(lean: bool, trial: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = 0
    original = train_loop.pair_batch

    def counting(rows, pad, device, read_prompt):
        nonlocal counted
        batch = original(rows, pad, device, read_prompt)
        if len(rows["chosen_ids"]) < 8:  # a training batch; evaluations take all eight
            counted += sum(len(ids) for side in ("chosen", "rejected") for ids in rows[f"{side}_ids"])
        return batch

    monkeypatch.setattr(train_loop, "pair_batch", counting)
    folder = trial(*OFF, f"launcher.lean_logits={lean}", "orpo.gradient_accumulation=2")
    folder.ask_to_stop()
    assert run_trial(folder, 1) == "stopped"
    folder.begin_attempt(2)
    assert run_trial(folder, 2) == "completed"
    assert folder.read_metrics()[-1]["step"] == 4
    assert folder.read_status().metrics["train/num_tokens"] == counted > 0


@pytest.mark.parametrize("cache_gb", [0, 1])
@pytest.mark.parametrize("kind", ["bias", "scale", "mlp"])
def test_what_was_learned_agrees_with_the_formula(kind: str, cache_gb: int, trial: Made) -> None:
    folder = trial(
        *OFF, f"adapter={kind}", f"launcher.activation_cache_gb={cache_gb}", "data.eval_size=2", "orpo.learning_rate=0.1"
    )
    assert run_trial(folder, 1) == "completed"
    found = np.load(folder.latents)
    (site,) = json.loads(str(found["sites"]))
    layer = site["layer"]
    moved, vector, share = (found[f"{layer}.{name}"] for name in ("moved", "vector", "share"))
    sae = load_sae(SITE)
    assert share.sum() == pytest.approx(1, abs=1e-4)
    assert vector == pytest.approx(moved @ sae.decoder.numpy(), rel=1e-5, abs=1e-4)
    if kind == "bias":
        assert torch.equal(torch.from_numpy(moved), weights(folder))

    model, tokenizer = load_model(str(folder.adapter), base=folder.read_spec().experiment.model)
    streams = {}
    for name in ("before", "after"):
        kept = []
        handle = (
            model.get_base_model().model.layers[layer].register_forward_hook(lambda _m, _i, o, kept=kept: kept.append(o))
        )
        for ids in held_out(folder, tokenizer):
            with torch.no_grad(), model.disable_adapter() if name == "before" else torch.no_grad():
                model(torch.tensor([ids]))
        handle.remove()
        streams[name] = torch.cat([stream[0, 1:] for stream in kept])
        assert len(streams[name]) == site["tokens"]
        assert found[f"{layer}.{name}"] == pytest.approx((sae.encode(streams[name]) > 0).float().mean(0).numpy(), abs=0.01)
    assert vector == pytest.approx((streams["after"] - streams["before"]).mean(0).numpy(), rel=1e-3, abs=1e-3)


def held_out(folder: TrialFolder, tokenizer) -> list[list[int]]:
    from isaerft_sweep.trial.data import PairTokenizer, load_pairs

    experiment = folder.read_spec().experiment
    tokenize = PairTokenizer(tokenizer, experiment.orpo.max_length)
    rows = load_pairs(experiment.data, tokenizer, experiment.orpo.max_length).evaluation
    return [tokenize(row)[f"{side}_ids"] for row in rows for side in ("chosen", "rejected")]


def test_l1_is_the_proximal_step(trial: Made) -> None:
    """One step of Adam moves each number by lr, so l1 = 1/4 leaves three quarters of lr."""
    options = (*OFF, "orpo.max_steps=1", "orpo.warmup_steps=0", "orpo.schedule=constant", "orpo.learning_rate=0.01")
    dense, sparse = trial(*options, name="dense"), trial(*options, "adapter.l1=0.25", name="sparse")
    assert run_trial(dense, 1) == run_trial(sparse, 1) == "completed"
    expected = weights(dense).sign() * (weights(dense).abs() - 0.0025).clamp_min(0)
    assert torch.allclose(weights(sparse), expected, atol=1e-7)
    strong = trial(*options, "adapter.l1=2", name="strong")
    assert run_trial(strong, 1) == "completed" and not weights(strong).any()


@pytest.mark.parametrize("kind", ["bias", "scale"])
def test_top_k_keeps_the_latents_that_steer_most(kind: str, trial: Made) -> None:
    options = (*OFF, f"adapter={kind}", "orpo.warmup_steps=0", "orpo.schedule=constant")
    half = trial(*options, "orpo.max_steps=3", name="half")  # what the middle of six steps looks like, nearly: constant rate
    few = trial(*options, "orpo.max_steps=6", "adapter.top_k=5", name="few")
    assert run_trial(half, 1) == run_trial(few, 1) == "completed"
    strength = weights(half).abs() * load_sae(SITE).decoder.norm(dim=-1)
    assert set(weights(few).nonzero().flatten().tolist()) == set(strength.topk(5).indices.tolist())


@pytest.mark.parametrize("option", ["adapter.l1=0.3", "adapter.top_k=5"])
def test_a_sparse_trial_resumes_exactly(option: str, trial: Made) -> None:
    options = (*OFF, option, "orpo.max_steps=6")
    whole, cut = trial(*options, name="whole"), trial(*options, name="cut")
    assert run_trial(whole, 1) == "completed"
    for attempt in range(1, 6):
        cut.begin_attempt(attempt)
        cut.ask_to_stop()
        assert run_trial(cut, attempt) == "stopped"
    cut.begin_attempt(6)
    assert run_trial(cut, 6) == "completed"
    assert torch.equal(weights(cut), weights(whole))
    assert cut.read_evaluation() == whole.read_evaluation()


def test_sparsity_needs_one_number_per_latent(experiment) -> None:
    with pytest.raises(ConfigError, match=r"must go with adapter\.kind bias or scale"):
        experiment("model=tiny", "adapter=mlp", "adapter.l1=0.1")
    with pytest.raises(ConfigError, match=r"must not be set together"):
        experiment("model=tiny", "adapter.l1=0.1", "adapter.top_k=3")
    with pytest.raises(ConfigError, match=r"adapter\.l1 must be at least 0"):
        experiment("model=tiny", "adapter.l1=-1")
