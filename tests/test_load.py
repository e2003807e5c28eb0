"""Loading an adapter by its name on the Hub, from the Hub's cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from transformers import AutoTokenizer

from isaerft_sweep.adapter import load_model
from isaerft_sweep.journal.folders import TrialFolder
from isaerft_sweep.models.loading import load
from isaerft_sweep.trial.run import run_trial

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
