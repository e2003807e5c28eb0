"""What a trial records for emulation: the gradients of the loss's two parts, and the vector that the model sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.plain_trl import orpo_rows
from helpers.trials import OFF, Made, assert_near, rows_of, run_both_ways
from safetensors.torch import load_file

from isaerft_sweep.adapter.sae import load_sae
from isaerft_sweep.controller.emulated_search import read_anchor
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.worker_queue import WorkerFolder
from isaerft_sweep.spec_fields import to_dict
from isaerft_sweep.trial.gradient_record import GradientRecord
from isaerft_sweep.trial.runner import run_trial

RECORDED = (*OFF, "sweep.emulate=true", "orpo.learning_rate=0.1", "orpo.beta=2", "orpo.eval_fraction=0.5")


def record_of(folder: TrialFolder) -> dict[str, Any]:
    with np.load(folder.gradients) as saved:
        return dict(saved)


@pytest.mark.parametrize("options", [(), ("orpo.gradient_accumulation=2", "orpo.batch_size=3")])
def test_the_parts_are_the_gradients_of_trl(
    options: tuple[str, ...], trial: Made, tmp_path: Path, gradients: list[torch.Tensor]
) -> None:
    folder, plain = trial(*RECORDED, *options, name="recorded"), trial(*RECORDED[1:], *options, name="plain")
    assert run_trial(folder, 1) == "completed"
    applied = torch.stack(gradients).numpy()
    gradients.clear()
    orpo_rows(folder.read_spec().experiment, tmp_path / "trl")
    theirs = torch.stack(gradients).numpy()
    record = record_of(folder)
    nll, odds_ratio = record["gradients"][:, 0], record["gradients"][:, 1]
    beta = folder.read_spec().experiment.orpo.beta
    clipped = np.minimum(1.0, 1.0 / np.linalg.norm(nll + beta * odds_ratio, axis=1, keepdims=True))
    np.testing.assert_allclose((nll + beta * odds_ratio) * clipped, applied, atol=1e-6)
    first = float(np.linalg.norm(applied[0] - theirs[0]) / np.linalg.norm(theirs[0]))
    assert first < 1e-5, "before the first step both have the same adapter"
    assert float(np.abs(odds_ratio).max()) > 1e-4 and float(np.abs(nll).max()) > 1e-4
    gradients.clear()
    plain.spec.write_text(plain.spec.read_text().replace('"emulate": true', '"emulate": false'))
    assert run_trial(plain, 1) == "completed" and not plain.gradients.exists()
    assert_near(folder, plain)


def test_the_vectors_are_what_the_model_sees(trial: Made) -> None:
    folder = trial(*RECORDED)
    assert run_trial(folder, 1) == "completed"
    record, spec = record_of(folder), folder.read_spec().experiment
    bias = next(iter(load_file(folder.adapter / "adapter_model.safetensors").values()))
    decoder = load_sae(to_dict(spec.adapter.sites[0])).decoder
    assert len(record["vectors"]) == len(record["gradients"]) + 1 == len(record["projected"])
    np.testing.assert_allclose(record["vectors"][0], 0)
    np.testing.assert_allclose(record["vectors"][-1], (bias @ decoder).numpy(), atol=1e-6)
    np.testing.assert_allclose(record["projected"], record["vectors"] @ decoder.numpy().T, atol=1e-5)
    anchor = read_anchor(folder)
    assert anchor is not None and sorted(anchor.evaluations) == [0, 2, 4]
    assert anchor.evaluations[4]["eval/log_odds_chosen"] == rows_of(folder)[-1]["eval/log_odds_chosen"]


def test_a_resumed_trial_has_the_record_of_an_uninterrupted_one(trial: Made) -> None:
    whole, cut = trial(*RECORDED, name="whole"), trial(*RECORDED, name="cut")
    assert run_trial(whole, 1) == "completed"
    cut.ask_to_stop()
    assert run_trial(cut, 1) == "stopped"
    assert read_anchor(cut) is None, "it has no end yet"
    cut.begin_attempt(2)
    assert run_trial(cut, 2) == "completed"
    for name, rows in record_of(whole).items():
        np.testing.assert_array_equal(record_of(cut)[name], rows)


@pytest.mark.parametrize("content", [b"", b"broken", None])
def test_a_record_that_lacks_steps_is_not_continued(content: bytes | None, tmp_path: Path) -> None:
    record = GradientRecord(torch.nn.Linear(2, 2), 4, tmp_path / "gradients.npz")  # type: ignore[arg-type]
    if content is not None:
        record.path.write_bytes(content)
    assert record.resume(0) and not record.resume(2)
    rows = {"gradients": np.zeros((1, 2, 6)), "vectors": np.zeros((1, 4)), "projected": np.zeros((1, 6))}
    np.savez(record.path, **rows)
    assert not record.resume(2) and record.resume(1)


@pytest.mark.slow
def test_co_batched_trials_record_as_alone(trial: Made, tmp_path: Path) -> None:
    settings = [
        ("orpo.beta=0.5",),
        ("orpo.beta=3", "orpo.gradient_accumulation=2"),
        ("sweep.emulate=false",),
        ("adapter=vector",),
    ]
    for expected, mine in run_both_ways(trial, RECORDED, settings, WorkerFolder(tmp_path / "worker")):
        assert_near(mine, expected)
        assert mine.gradients.exists() == expected.gradients.exists()
        if mine.gradients.exists():
            np.testing.assert_allclose(record_of(mine)["gradients"], record_of(expected)["gradients"], atol=2e-4)
