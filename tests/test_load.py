"""What comes from the Hub: an adapter by its name, a data set with slices, a tokenizer of another repository."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from transformers import AutoTokenizer

from isaerft_sweep.adapter import load_model
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.models.loading import load, load_tokenizer
from isaerft_sweep.spec_fields import overrides
from isaerft_sweep.trial.data import load_pairs
from isaerft_sweep.trial.runner import run_trial

COMMIT = "b" * 40


def in_cache(cache: Path, name: str, folder: Path) -> None:
    """Lay the files of a repository where the Hub's client keeps what it has downloaded."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    if not (folder / "config.json").exists():  # how the client remembers that the Hub has no such file
        (place / ".no_exist" / COMMIT).mkdir(parents=True)
        (place / ".no_exist" / COMMIT / "config.json").touch()


@pytest.mark.slow
def test_an_adapter_from_the_hub_brings_its_own_tokenizer(
    trial: Callable[..., TrialFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trial("tracker=disabled")
    load(folder.read_spec().experiment.model, None)  # makes the base
    assert run_trial(folder, 1) == "completed"
    base = tmp_path / "base"
    shutil.copytree(Path(os.environ["ISAERFT_CACHE"]) / "models" / "tiny-llama", base)
    (base / "chat_template.jinja").unlink()
    bare = AutoTokenizer.from_pretrained(base)
    bare.chat_template = None
    bare.save_pretrained(base)
    adapter = tmp_path / "adapter"
    shutil.copytree(folder.adapter, adapter)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(folder.read_spec().experiment.model.name, "lab/base"))
    hub = tmp_path / "hub"
    in_cache(hub, "lab/base", base)
    in_cache(hub, "lab/adapter", adapter)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    model, tokenizer = load_model("lab/adapter")
    assert model.config.name_or_path == "lab/base"
    assert AutoTokenizer.from_pretrained("lab/base").chat_template is None
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


@pytest.mark.slow
def test_a_data_set_with_slices_and_another_models_tokenizer(
    trial: Callable[..., TrialFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `model=gemma-2-2b data=ultrafeedback`, with folders in the place of repositories."""
    data, made = tmp_path / "pairs", Path(os.environ["ISAERFT_CACHE"]) / "models" / "tiny-llama"
    data.mkdir()
    for split, count in (("train", 40), ("test", 20)):
        rows = [
            {
                side: [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": words}]
                for side, words in (("chosen", "Gladly."), ("rejected", "No."))
            }
            for i in range(count)
        ]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    load(trial("tracker=disabled", name="makes").read_spec().experiment.model, None)
    base, instruct = tmp_path / "base", tmp_path / "instruct"
    for folder in (base, instruct):
        shutil.copytree(made, folder)
    bare = AutoTokenizer.from_pretrained(base)
    bare.chat_template = None
    (base / "chat_template.jinja").unlink(missing_ok=True)
    bare.save_pretrained(base)
    options = (
        "data=ultrafeedback", "orpo=quick",
        *overrides({
            "data.name": str(data), "data.train_split": "train[:12]", "data.eval_split": "test[:50%]",
            "data.train_size": None, "data.eval_size": None,
            "model.source": "hub", "model.name": str(base), "model.tokenizer": str(instruct),
        }),
    )  # fmt: skip
    folder = trial("tracker=disabled", *options, "orpo.max_steps=3", name="hub")
    assert run_trial(folder, 1) == "completed", folder.read_status()
    assert len(folder.read_evaluation()["trained"]["pairs"]) == 10
    assert "12 pairs to train on, 10 held out" in describe(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder.adapter)
    assert tokenizer.chat_template is not None, "the adapter keeps the tokenizer that it was trained with"


def describe(folder: TrialFolder) -> str:
    experiment = folder.read_spec().experiment
    return load_pairs(experiment.data, load_tokenizer(experiment.model, None), experiment.orpo.max_length).summary
