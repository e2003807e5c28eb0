"""Which command goes on with which sweep: the question, the files behind it, and paths that mean the same from anywhere."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, events

from isaerft_sweep.cli import main
from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.config.compose import compose
from isaerft_sweep.controller import sweep_identity as asking
from isaerft_sweep.controller.sweep_identity import (
    begin_sweep,
    check_files,
    known_fingerprints,
    open_journal,
    result_files,
    settings,
    sweep_folder,
)
from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.specs import Experiment

Launch = Callable[..., subprocess.CompletedProcess[str]]


def composed(*overrides: str) -> tuple[Experiment, Any]:
    experiment = compose([*TINY, *overrides])
    return experiment, to_definition(experiment.sweep, experiment)


def write_pairs(path: Path, words: str = "no") -> Path:
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": words} for i in range(40)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_local_paths_are_absolute_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "model").mkdir()
    experiment, _ = composed(
        "data=jsonl", "data.path=pairs.jsonl", "data.eval_path='~/held-out.jsonl'", "model.source=hub", "model.name=model",
        "model.tokenizer=org/name", "adapter.sites=[{layer: 2, sae_path: sae}]", "cache=c", "launcher.scratch=s", "sweep=none",
    )  # fmt: skip
    assert experiment.data.path == str(tmp_path / "pairs.jsonl")
    assert experiment.data.eval_path == str(tmp_path / "home" / "held-out.jsonl")
    assert (experiment.model.name, experiment.model.tokenizer) == (str(tmp_path / "model"), "org/name")
    assert experiment.adapter.sites[0].sae_path == str(tmp_path / "sae")
    assert (experiment.cache, experiment.launcher.scratch) == (str(tmp_path / "c"), str(tmp_path / "s"))
    assert compose(["data=jsonl", "data.path=s3://b/p.jsonl"]).data.path == "s3://b/p.jsonl"


@pytest.mark.parametrize("nested", [False, True])
def test_swept_files_are_absolute_too(nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = {"values": ["a.jsonl", "/b.jsonl"]}
    parameters = {"data": {"parameters": {"path": block}}} if nested else {"data.path": block}
    raw = {"method": "grid", "metric": {"name": "eval/loss"}, "parameters": {**parameters, "orpo.beta": {"value": 1.0}}}
    Path("s.yaml").write_text(yaml.safe_dump(raw))
    _, definition = composed("data=jsonl", "data.path=x", "sweep=none", "sweep.file=s.yaml")
    assert definition.parameters["data.path"].choices == (str(tmp_path / "a.jsonl"), "/b.jsonl")
    kept = definition.raw["parameters"]
    kept = kept["data"]["parameters"]["path"] if nested else kept["data.path"]
    assert kept["values"] == [str(tmp_path / "a.jsonl"), "/b.jsonl"], "what sweep.yaml keeps for attach"


@pytest.mark.parametrize("spelled", ["pairs.jsonl", "./pairs.jsonl"])
def test_a_sweep_of_relative_paths_by_an_earlier_version_goes_on(
    spelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "sae_weights.safetensors").write_bytes(b"weights")
    experiment, definition = composed(
        "data=jsonl", f"data.path={spelled}", "adapter.sites=[{layer: 2, sae_path: sae}]", "sweep=none"
    )
    before = _as_it_was_given(experiment, spelled)
    old = asking.sweep_fingerprint(before, definition)
    assert old != known_fingerprints(experiment, definition)[0] and old in known_fingerprints(experiment, definition)
    named = SweepFolder(tmp_path / "outputs" / f"none-tiny-llama-files-bias-{old[:6]}")
    journal = open_journal(named, [old])
    begin_sweep(before, definition, named, journal, old)
    journal.close()
    assert sweep_folder(experiment, definition).path == named.path, "the folder that it has made"
    open_journal(named, known_fingerprints(experiment, definition)).close()


def _as_it_was_given(experiment: Experiment, spelled: str) -> Experiment:
    """What the earlier version's config was: paths as they were typed."""
    from dataclasses import replace

    sites = tuple(replace(site, sae_path="sae") for site in experiment.adapter.sites)
    return replace(
        experiment,
        data=replace(experiment.data, path=spelled),
        adapter=replace(experiment.adapter, sites=sites),
    )


def test_another_sweep_in_the_folder_is_told_by_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment, definition = composed("name=x", "orpo.max_steps=4")
    folder = sweep_folder(experiment, definition)
    journal = open_journal(folder, known_fingerprints(experiment, definition))
    begin_sweep(experiment, definition, folder, journal)
    journal.close()
    other, wider = composed("name=x", "orpo.max_steps=8", "sweep=grid", "data.train_size=20")
    with pytest.raises(FolderError) as caught:
        open_journal(folder, known_fingerprints(other, wider), settings(other, wider))
    said = str(caught.value)
    assert "orpo.max_steps was 4 and is now 8" in said and "data.train_size was 24 and is now 20" in said
    assert 'method was "bayes" and is now "grid"' in said and "parameters: orpo.beta was" in said
    assert "question" not in said and "\n" not in said


def kinds_of_files(tmp_path: Path) -> dict[str, Path]:
    model, sae = tmp_path / "model", tmp_path / "sae"
    for folder, names in ((model, ("config.json", "model.safetensors")), (sae, ("cfg.json", "sae_weights.safetensors"))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(name)
    return {
        "data": write_pairs(tmp_path / "pairs.jsonl"),
        "held-out data": write_pairs(tmp_path / "held-out.jsonl", "never"),
        "model weights": model / "model.safetensors",
        "model config": model / "config.json",
        "SAE weights": sae / "sae_weights.safetensors",
        "SAE config": sae / "cfg.json",
    }


@pytest.mark.parametrize("kind", ["data", "held-out data", "model weights", "model config", "SAE weights", "SAE config"])
@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_what_decides_a_result_must_not_change_under_a_sweep(kind: str, change: str, tmp_path: Path) -> None:
    files = kinds_of_files(tmp_path)
    experiment, definition = composed(
        "data=jsonl", f"data.path={files['data']}", f"data.eval_path={files['held-out data']}", "model.source=hub",
        f"model.name={tmp_path / 'model'}", f"adapter.sites=[{{layer: 2, sae_path: {tmp_path / 'sae'}}}]", "sweep=none",
    )  # fmt: skip
    folder = SweepFolder(tmp_path / "outputs" / "x")
    check_files(folder, result_files(experiment, definition))
    check_files(folder, result_files(experiment, definition))
    facts = files[kind].stat()
    if change == "removed":
        files[kind].unlink()
    else:  # the same size, and the time of before
        files[kind].write_bytes(bytes(reversed(files[kind].read_bytes())))
        os.utime(files[kind], ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    if change == "removed" and "data" in kind:
        return  # the check before the sweep says that it is missing
    with pytest.raises(FolderError, match="must be unchanged") as caught:
        check_files(folder, result_files(experiment, definition))
    assert str(files[kind]) in str(caught.value)


def test_a_large_file_is_known_by_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "HASHED_BYTES", 100)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"a" * 1000)
    first = asking._stamp(path)
    assert asking._stamp(path) == first
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 5))
    assert asking._stamp(path) != first


def test_a_repository_on_the_hub_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    experiment, definition = composed("model=gemma-2-2b", "data=ultrafeedback", "sweep=none")
    assert result_files(experiment, definition) == {}
    for kind, name in (("model", "google/gemma-2-2b"), ("dataset", "trl-lib/ultrafeedback_binarized")):
        refs = tmp_path / f"{kind}s--{name.replace('/', '--')}" / "refs"
        refs.mkdir(parents=True)
        (refs / "main").write_text("c0ffee")
    found = result_files(experiment, definition)
    assert found == {"model google/gemma-2-2b": "c0ffee", "dataset trl-lib/ultrafeedback_binarized": "c0ffee"}


@pytest.mark.slow
@pytest.mark.long
def test_a_replaced_data_file_is_refused_and_the_target_ends_a_sweep(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    held_out = write_pairs(tmp_path / "held-out.jsonl", "never")
    raw = {
        "method": "random",
        "metric": {"name": "eval/nll_loss", "goal": "minimize", "target": 1000},
        "run_cap": 4,
        "name": "first look",
        "parameters": {"orpo.learning_rate": {"min": 0.01, "max": 0.1}},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(raw))
    command = [*TINY, "data=jsonl", "data.path=pairs.jsonl", "data.eval_path=held-out.jsonl", "tracker=disabled",
               "sweep=none", "sweep.file=s.yaml", "name=x"]  # fmt: skip
    done = launch(*command)
    assert done.returncode == 0, done.stderr
    assert "(first look)" in done.stdout and "ends when eval/nll_loss reaches 1000" in done.stdout
    assert "trial 1 has reached the sweep file's metric.target, 1000" in done.stdout
    assert [e["event"] for e in events(tmp_path / "outputs" / "x")].count("trial") == 1
    assert main(["status", str(tmp_path / "outputs" / "x"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_s"] is None, "nothing runs, so no time is left"
    assert main(["status", str(tmp_path / "outputs" / "x")]) == 0
    assert "none: the sweep has ended after 1 of 4 trials: trial 1 has reached" in capsys.readouterr().out
    write_pairs(held_out, "another word")
    done = launch(*command, "sweep.run_cap=6")
    assert done.returncode == 2 and "held-out.jsonl" in done.stderr
