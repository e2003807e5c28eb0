"""What ISAERFT is compared with: random directions, plain vectors, DiffMean, LoReFT, LoRA. (Numbers against TRL:
test_trial_numbers.py.)"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from conftest import TINY
from helpers.sweeps import make_sweep
from helpers.trials import OFF, Made, rows_of

from isaerft_sweep import naming
from isaerft_sweep.adapter import load_model
from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.adapter.sae import load_sae, randomised
from isaerft_sweep.config.compose import compose
from isaerft_sweep.errors import ConfigError, IsaerftError
from isaerft_sweep.models.loading import load
from isaerft_sweep.publish.export import export
from isaerft_sweep.results.answer import answer, methods
from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.results.report.write import write_report
from isaerft_sweep.results.sweep_results import SweepResults
from isaerft_sweep.spec_fields import to_dict
from isaerft_sweep.trial.data import load_pairs
from isaerft_sweep.trial.prepare import prepare
from isaerft_sweep.trial.runner import run_trial

KINDS = ["random", "vector", "diffmean", "loreft", "lora"]


def test_random_directions_have_the_saes_number_and_norms() -> None:
    sae = load_sae({"layer": 0, "sae_release": "isaerft-sweep", "sae_id": "random-64x256"})
    random = randomised(sae)
    assert random.decoder.shape == sae.decoder.shape
    assert random.decoder.norm(dim=1) == pytest.approx(sae.decoder.norm(dim=1))
    assert (torch.nn.functional.cosine_similarity(random.decoder, sae.decoder).abs() < 0.6).all()
    assert torch.equal(randomised(sae).decoder, random.decoder), "the same ones for every trial and after loading"


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_trains_saves_loads_and_says_its_method(kind: str, trial: Made, tmp_path: Path) -> None:
    folder = trial(*OFF, f"adapter={kind}", "orpo.learning_rate=0.05")
    assert run_trial(folder, 1) == "completed"
    spec, status = folder.read_spec(), folder.read_status()
    rows = rows_of(folder)
    first, last = (row["eval/log_odds_chosen"] for row in (rows[0], rows[-1]))
    assert status.metrics["eval/kl_base"] > 0 and first != last
    model, tokenizer = load_model(str(folder.adapter))
    ids = tokenizer("My parcel has not arrived yet.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        with_adapter = model(ids).logits
        with model.disable_adapter():
            assert not torch.allclose(model(ids).logits, with_adapter)
    method = kind.upper()
    card = (folder.adapter / "README.md").read_text()
    assert "sparse autoencoder" in card if kind in ("random", "vector") else "sparse autoencoder" not in card
    assert naming.model_name("SmolLM2", spec.name, kind=kind).partition("-FT-ORPO-")[2].startswith(f"{method}_")
    assert naming.parse(naming.model_name("SmolLM2", spec.name, kind=kind)).method == method
    if kind != "loreft":
        exported = export(folder.adapter, tmp_path / "out", None, None)
        assert exported.lost < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_every_level_of_reuse_and_a_resume_give_the_same_numbers(kind: str, trial: Made) -> None:
    rows = []
    for name, options in {
        "whole": ("launcher.activation_cache_gb=0", "launcher.lean_logits=false"),
        "all": ("launcher.activation_cache_gb=1",),
        "cut": ("launcher.activation_cache_gb=1",),
    }.items():
        folder = trial(*OFF, *options, f"adapter={kind}", "orpo.learning_rate=0.05", "orpo.max_steps=4", name=name)
        if name == "cut":
            folder.ask_to_stop()
            assert run_trial(folder, 1) == "stopped"
            folder.begin_attempt(2)
            assert run_trial(folder, 2) == "completed"
        else:
            assert run_trial(folder, 1) == "completed"
        rows.append(rows_of(folder))
    for other in rows[1:]:
        assert [row["step"] for row in other] == [row["step"] for row in rows[0]]
        for mine, plain in zip(other, rows[0], strict=True):
            assert mine == pytest.approx(plain, rel=1e-3, abs=1e-4)


def test_diffmean_is_the_difference_of_means(trial: Made) -> None:
    folder = trial(*OFF, "adapter=diffmean", "adapter.strength=1.5", "orpo.max_steps=-1", "orpo.epochs=1")
    assert run_trial(folder, 1) == "completed"
    experiment = folder.read_spec().experiment
    loaded = load(experiment.model, None)
    layer, sums = experiment.adapter.sites[0].layer, []
    for row in load_pairs(experiment.data, loaded.tokenizer, experiment.orpo.max_length).train:
        means = []
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                states = loaded.model.model(torch.tensor([row[f"{side}_ids"]]), output_hidden_states=True).hidden_states
            means.append(states[layer + 1][0, row[f"{side}_prompt_length"] :].mean(0))
        sums.append(means[0] - means[1])
    model, _ = load_model(str(folder.adapter))
    block = decoder_layers(model.get_base_model())[layer].isaerft_block["default"]
    assert block.bias == pytest.approx(1.5 * torch.stack(sums).mean(0), abs=1e-4)


def test_lora_loads_with_plain_peft(trial: Made) -> None:
    folder = trial(*OFF, "adapter=lora", "orpo.learning_rate=0.05")
    assert run_trial(folder, 1) == "completed"
    config = json.loads((folder.adapter / "adapter_config.json").read_text())
    site = folder.read_spec().experiment.adapter.sites[0].layer
    assert config["peft_type"] == "LORA" and config["r"] == 8 and config["lora_alpha"] == 16
    assert {int(name.split(".")[2]) for name in config["target_modules"]} == set(
        range(site + 1, len(decoder_layers(load(folder.read_spec().experiment.model, None).model)))
    )
    loaded = load(folder.read_spec().experiment.model, None)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(loaded.model), str(folder.adapter))
    ours, _ = load_model(str(folder.adapter))
    ids = torch.arange(6, 30)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("adapter=vector", "adapter.l1=0.1"), "must go with adapter.kind bias or scale"),
        (("adapter=bias", "adapter.rank=4"), "adapter.rank must go with adapter.kind linear, mlp, lora, loreft"),
        (("adapter=vector", "adapter.system_prompt=Hi."), "adapter.system_prompt must be a text with adapter.kind prompt"),
        (("adapter=prompt", "adapter.system_prompt=''"), "adapter.system_prompt must be a text with adapter.kind prompt"),
        (("adapter=prompt",), "adapter.system_prompt must be a text with adapter.kind prompt"),
        (("adapter=bias", "adapter.strength=2"), "adapter.strength must go with adapter.kind diffmean"),
        (("adapter=lora", "adapter.sites=[{layer: 3}]"), "layer 3 is the last one"),
        (("adapter=vector", "adapter.sites=[{layer: 4}]"), "must be between 0 and 3"),
    ],
)
def test_what_does_not_go_together(options: tuple[str, ...], words: str) -> None:
    with pytest.raises(IsaerftError, match=words):
        prepare(compose([*TINY, *options]))


def test_the_control_needs_no_sae() -> None:
    experiment = compose([*TINY, "adapter=vector", "adapter.sites=[{layer: 1}]"])
    assert to_dict(experiment.adapter.sites[0])["layer"] == 1 and prepare(experiment)["saes"] == []
    with pytest.raises(ConfigError, match="must have either sae_release"):
        compose([*TINY, "adapter=random", "adapter.sites=[{layer: 1}]"])


def sweep_of_kinds(path: Path) -> SweepResults:
    """The made-up sweep's trials as three kinds: 4 best, a vector, then 3 bias, 2 lora, 1 bias, 0 vector."""
    folder = make_sweep(path)
    kinds = ["vector", "bias", "lora", "bias", "vector"]
    lines = folder.journal.read_text().splitlines()
    for number, line in enumerate(lines):
        event = json.loads(line)
        if event["event"] == "trial":
            event["params"]["adapter.kind"] = kinds[event["index"]]
            status = json.loads(folder.trial(event["name"]).status.read_text())
            status["metrics"]["eval/kl_base"] = 0.1 * (event["index"] + 1)
            folder.trial(event["name"]).status.write_text(json.dumps(status))
        lines[number] = json.dumps(event)
    folder.journal.write_text("\n".join(lines) + "\n")
    return read_sweep_folder(folder.path)


def test_a_sweep_over_kinds_compares_their_best(tmp_path: Path) -> None:
    sweep = sweep_of_kinds(tmp_path / "s")
    compared = methods(sweep)
    assert [(m.kind, m.completed, m.best.record.index if m.best else None) for m in compared] == [
        ("vector", 2, 4),
        ("bias", 2, 3),
        ("lora", 1, 2),
    ]
    assert sum(m.probability_best or 0 for m in compared) == pytest.approx(1)
    said = answer(sweep)
    gap = sweep.entries[0].metrics["eval/log_odds_chosen"] - sweep.entries[1].metrics["eval/log_odds_chosen"]
    assert said[0].startswith("Trial 5 (lr ") and "is the best by eval/log_odds_chosen, with a probability of " in said[0]
    assert any(
        f"The best bias is trial 4, {gap:.4f} behind at a KL of 0.400; the probability that a bias" in s for s in said
    )
    page, _ = write_report(sweep)
    html = page.read_text()
    assert "Methods compared" in html and "one of them is best" in html and said[0].split(",")[0] in html


def test_one_kind_is_not_compared(tmp_path: Path) -> None:
    sweep = read_sweep_folder(make_sweep(tmp_path / "s").path)
    assert methods(sweep) == [] and not any("The best" in text for text in answer(sweep))
