"""Folders of the published project, in its exact form, become adapters of ours; what is not one executes nothing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from sae_lens import SAE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.cli import main
from isaerft_sweep.models import random_model
from isaerft_sweep.publish.export import export
from isaerft_sweep.publish.legacy import import_folder
from isaerft_sweep.specs import ModelSpec

NAME = "GEMMA-2-2B-FT-ORPO-ISAERFT_run-gemma-2-2b-lr3.6e-05-beta0.2-20250228-2228"
LATER = "GEMMA-2-2B-FT-ORPO-ISAERFT_gemma-2-2b-lr1.1e-05-beta0.2-20250301-0424"
GEMMA_SCOPE = ["gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical"]


def published(path: Path, states: dict[str, dict[str, torch.Tensor]], **config: Any) -> Path:
    """A folder as the published project's ``save_pretrained`` writes it."""
    path.mkdir(parents=True)
    facts = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "depth": -1,
        "hidden_size": None,
        "inference_mode": False,
        "is_prompt_learning": False,
        "lora_r": None,
        "peft_type": "ISAERFT",
        "revision": None,
        "target_hooks": [GEMMA_SCOPE for _ in states],
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps({**facts, **config}, indent=2))
    (path / "blocks_manifest.json").write_text(json.dumps({"block_names": list(states)}, indent=2))
    for name, state in states.items():
        torch.save(state, path / f"{name}.pt")
    (path / "tokenizer_config.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("name", "lr", "started"), [(NAME, 3.6e-05, "2025-02-28T22:28:00"), (LATER, 1.1e-05, "2025-03-01T04:24:00")]
)
def test_the_published_run(name: str, lr: float, started: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bias = torch.randn(16384)
    source = published(tmp_path / name, {"blocks_20_hook_resid_post": {"sequential.0.bias": bias}})
    assert main(["import", str(source), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "bias at layer 20 of google/gemma-2-2b" in said and f"{lr:.1e}, beta 0.2" in said
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "google/gemma-2-2b" and config["kind"] == "bias"
    assert config["sites"] == [{"layer": 20, "sae_release": GEMMA_SCOPE[0], "sae_id": GEMMA_SCOPE[1]}]
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert list(state) == ["base_model.model.model.layers.20.isaerft_block.bias"] and torch.equal(*state.values(), bias)
    facts = json.loads((tmp_path / "out" / "imported.json").read_text())
    assert facts == {"from": name, "model": "gemma-2-2b", "learning_rate": lr, "beta": 0.2, "started": started}
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert f"lr_{lr}" in (tmp_path / "out" / "README.md").read_text()
    assert main(["push", str(tmp_path / "out"), "--dry-run"]) == 0 and name in capsys.readouterr().out


def residual_block(state: dict[str, torch.Tensor], depth: int, f: torch.Tensor) -> torch.Tensor:
    """The published block's own formula: linear maps, ReLU after every hidden one but the last, and f added."""
    x, place = f, 0
    for i in range(depth + 1):
        x = x @ state[f"sequential.{place}.weight"].T + state[f"sequential.{place}.bias"]
        place += 1
        if i < depth - 1:
            x, place = x.relu(), place + 1
    return x + f


def random_state(depth: int, d_sae: int, hidden: int) -> dict[str, torch.Tensor]:
    widths, state, place = [d_sae, *[hidden] * depth, d_sae], {}, 0
    for i in range(depth + 1):
        state[f"sequential.{place}.weight"] = torch.randn(widths[i + 1], widths[i]) / 8
        state[f"sequential.{place}.bias"] = torch.randn(widths[i + 1]) / 8
        place += 2 if i < depth - 1 else 1
    return state


@pytest.mark.parametrize("depth", [-1, 0, 1, 2, 3, None])
@torch.no_grad()
def test_every_form_computes_what_it_did(depth: int | None, saes: dict[str, str], cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    d_sae, sae = 96, SAE.load_from_disk(saes["jumprelu"], dtype="float32")
    if depth is None:
        state = {"scaling_factors": torch.randn(d_sae)}
    elif depth == -1:
        state = {"sequential.0.bias": torch.randn(d_sae)}
    else:
        state = random_state(depth, d_sae, 24)
    source = published(
        tmp_path / "old",
        {"blocks_2_hook_resid_post": state},
        depth=depth,
        ia3=depth is None,
        hidden_size=24 if depth else None,
        target_hooks=[["a-release", "blocks.2.hook_resid_post"]],
    )
    folder = random_model.made_folder(ModelSpec(name="tiny", source="random", architecture="gemma2"), cache)
    made = import_folder(source, tmp_path / "new", str(folder))
    config = json.loads((made.folder / "adapter_config.json").read_text())
    config["sites"] = [{"layer": 2, "sae_path": saes["jumprelu"]}]
    (made.folder / "adapter_config.json").write_text(json.dumps(config))

    def new_latents(f: torch.Tensor) -> torch.Tensor:
        if depth is None:
            return f * (1 + state["scaling_factors"])
        return f + state["sequential.0.bias"] if depth == -1 else residual_block(state, depth, f)

    def hook(_module: Any, _inputs: Any, x: torch.Tensor) -> torch.Tensor:
        f = sae.encode(x)
        return x + sae.decode(new_latents(f)) - sae.decode(f)

    ids = torch.arange(6, 40)[None]
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain = reference(ids).logits
    decoder_layers(reference)[2].register_forward_hook(hook)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder).eval(), made.folder)
    found, expected = adapted(ids).logits, reference(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-2


class Boom:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


BIAS = {"sequential.0.bias": torch.zeros(16)}


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published(tmp_path / NAME, {"blocks_20_hook_resid_post": BIAS})
    for content in (pickle.dumps(Boom(tmp_path / "boom")), None):
        if content is None:
            torch.save(Boom(tmp_path / "boom"), source / "blocks_20_hook_resid_post.pt")
        else:
            (source / "blocks_20_hook_resid_post.pt").write_bytes(content)
        assert main(["import", str(source), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert "must hold only tensors" in said and "not loaded" in said and "Traceback" not in said
    assert not (tmp_path / "boom").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("states", "config", "words"),
    [
        ({"blocks_20_hook_resid_post": {"sequential.0.weight": torch.zeros(4, 4)}}, {}, "must hold one vector named sequential.0.bias"),
        ({"blocks_20_hook_resid_post": torch.zeros(4)}, {}, "must be a state dict"),
        ({"blocks_20_hook_resid_post": {"a": 1}}, {}, "must be a state dict"),
        ({"blocks_20_hook_resid_post": BIAS}, {"depth": -2}, "depth must be -1 or more"),
        ({"blocks_20_hook_resid_post": BIAS}, {"depth": 0}, "which depth=0 needs"),
        ({"blocks_20_hook_resid_post": random_state(2, 8, 4)}, {"depth": 1}, "lacks"),
        ({"blocks_20_hook_resid_post": {**random_state(0, 8, 4), "more": torch.zeros(1)}}, {"depth": 0}, "does not explain"),
        ({"blocks_20_hook_mlp_out": BIAS}, {}, "must be named blocks_N_hook_resid_post"),
        ({"blocks_20_hook_resid_post": {"sequential.0.bias": torch.full((4,), float("nan"))}}, {}, "must hold finite numbers"),
        ({"blocks_20_hook_resid_post": {**random_state(0, 8, 4), "sequential.0.weight": torch.zeros(8)}}, {"depth": 0}, "follow each other"),
        ({"blocks_20_hook_resid_post": {**random_state(2, 8, 4), "sequential.2.weight": torch.zeros(5, 3)}}, {"depth": 2}, "follow each other"),
        ({"blocks_20_hook_resid_post": BIAS}, {"target_hooks": ["gemma"]}, "must be [release, sae_id]"),
        ({"blocks_20_hook_resid_post": BIAS}, {"target_hooks": [7]}, "must be [release, sae_id]"),
        ({"blocks_20_hook_resid_post": BIAS}, {"target_hooks": [["res", ""]]}, "must be [release, sae_id]"),
        ({"blocks_20_hook_resid_post": BIAS}, {"target_hooks": [["res", "layer_(5|20)/x"]]}, "hold the pattern"),
        ({"blocks_5_hook_resid_post": BIAS}, {}, "must have an SAE of that layer"),
        ({"blocks_20_hook_resid_post": BIAS}, {"target_hooks": []}, "must have target_hooks"),
        ({"blocks_20_hook_resid_post": BIAS}, {"target_hooks": None, "sites": []}, "needs no import"),
    ],
)  # fmt: skip
def test_what_is_not_such_a_folder(
    states: Any, config: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = published(tmp_path / NAME, states, **config)
    assert main(["import", str(source), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said, said
    assert not (tmp_path / "out").exists() and sorted(p.name for p in tmp_path.iterdir()) == [NAME]


def test_missing_and_broken_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published(tmp_path / "no-name-of-a-run", {"blocks_20_hook_resid_post": BIAS})
    assert main(["import", str(source), "--out", str(tmp_path / "out")]) == 2
    assert "--base ORG/NAME" in capsys.readouterr().err
    assert main(["import", str(source), "--out", str(tmp_path / "out"), "--base", "google/gemma-2-2b"]) == 0
    assert main(["import", str(source), "--out", str(tmp_path / "out"), "--base", "google/gemma-2-2b"]) == 2
    assert "must be empty or not there yet" in capsys.readouterr().err
    for content in (b"", b"just text", b"PK\x03\x04 cut short"):
        (source / "blocks_20_hook_resid_post.pt").write_bytes(content)
        assert main(["import", str(source), "--out", str(tmp_path / "two"), "--base", "a/b"]) == 2
        assert "blocks_20_hook_resid_post.pt" in capsys.readouterr().err
    assert main(["import", str(source), "--out", str(tmp_path / "two"), "--base", "a/b"]) == 2
    (source / "blocks_manifest.json").write_text("{half")
    assert main(["import", str(source), "--out", str(tmp_path / "two"), "--base", "a/b"]) == 2
    assert main(["import", str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 3 and "Traceback" not in said and not (tmp_path / "two").exists()


CARD = """---
base_model: google/gemma-2-2b
library_name: transformers
model_name: {name}
tags:
- generated_from_trainer
- smol-course
- module_1
- isaerft
- lr_3.568480459462587e-05
- beta_0.2
licence: license
---

# Model Card for {name}

[<img src="https://raw.githubusercontent.com/wandb/assets/main/wandb-github-badge-28.svg" alt="Visualize in Weights & Biases" \
width="150" height="24"/>](https://wandb.ai/lab/orpo-isaerft-sweep/runs/mx6b2k7p)
"""


def test_the_card_beside_the_adapter_tells_every_digit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published(tmp_path / NAME, {"blocks_20_hook_resid_post": {"sequential.0.bias": torch.zeros(16)}})
    (source / "README.md").write_text(CARD.format(name=NAME))
    assert main(["import", str(source), "--out", str(tmp_path / "out")]) == 0
    assert "3.568480459462587e-05, beta 0.2, 2025-02-28 22:28, https://wandb.ai/" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "imported.json").read_text())
    assert facts["learning_rate"] == 3.568480459462587e-05 and facts["started"] == "2025-02-28T22:28:00"
    assert facts["wandb"] == "https://wandb.ai/lab/orpo-isaerft-sweep/runs/mx6b2k7p"
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == facts["tags"] == [
        "generated_from_trainer", "smol-course", "module_1", "isaerft", "lr_3.568480459462587e-05", "beta_0.2",
    ]  # fmt: skip
    assert "(https://wandb.ai/lab/orpo-isaerft-sweep/runs/mx6b2k7p)" in card and "3.568480459462587e-05" in card
    assert "None" not in card and "not read yet" in card, "an SAE that was not read has no fingerprint"


def test_cards_that_tell_little_or_of_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bias = {"blocks_20_hook_resid_post": {"sequential.0.bias": torch.zeros(16)}}
    source = published(tmp_path / "nameless", bias)
    (source / "README.md").write_text(CARD.format(name="x"))
    assert main(["import", str(source), "--out", str(tmp_path / "out")]) == 0, "the card tells the base model"
    assert "of google/gemma-2-2b, 3.568480459462587e-05, beta 0.2, https" in capsys.readouterr().out
    for number, text in enumerate(("", "no front matter", "---\n: [\n---\n", "---\n- a\n---\n", "---\ntags: {a: 1}\n---\n")):
        named = published(tmp_path / str(number) / NAME, bias)
        (named / "README.md").write_text(text)
        assert main(["import", str(named), "--out", str(tmp_path / f"out{number}")]) == 0
    other = published(tmp_path / "other" / LATER, bias)
    (other / "README.md").write_text(CARD.format(name=NAME))
    capsys.readouterr()
    assert main(["import", str(other), "--out", str(tmp_path / "more")]) == 2
    said = capsys.readouterr().err
    assert "3.568480459462587e-05" in said and "1.1e-05" in said and said.count("\n") == 1


def test_exports_of_adapters_in_one_folder_have_folders_of_their_own(
    saes: dict[str, str], cache: Path, tmp_path: Path
) -> None:
    base = random_model.made_folder(ModelSpec(name="tiny", source="random", architecture="llama"), cache)
    for name in ("one", "two"):
        source = published(
            tmp_path / name,
            {"blocks_2_hook_resid_post": {"sequential.0.bias": torch.randn(96)}},
            target_hooks=[["r", "layer_2"]],
        )
        made = import_folder(source, tmp_path / "imported" / name, str(base))
        config = json.loads((made.folder / "adapter_config.json").read_text())
        config["sites"] = [{"layer": 2, "sae_path": saes["jumprelu"]}]
        (made.folder / "adapter_config.json").write_text(json.dumps(config))
        (made.folder / "tokenizer_config.json").unlink()  # an empty one; the base has a tokenizer
    folders = [export(tmp_path / "imported" / name, None, None, str(cache)).folder for name in ("one", "two")]
    assert [folder.name for folder in folders] == ["one-export-merged", "two-export-merged"]
