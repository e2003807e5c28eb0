"""The strength curve and what single latents do: against the trial's own numbers and against weights set by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.trials import OFF, Made
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from isaerft_sweep.adapter import load_model
from isaerft_sweep.adapter.strength import changed, set_strength
from isaerft_sweep.cli import main
from isaerft_sweep.publish.export import export
from isaerft_sweep.results.analysis import columns, read_analysis, rows_by_latent, rows_by_strength
from isaerft_sweep.trial.runner import run_trial
from isaerft_sweep.trial.variants import analyse

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("kind", ["bias", "scale", "linear", "mlp", "vector", "random", "loreft", "lora"])
def test_strength_1_is_the_trial_and_0_the_untrained_model(kind: str, trial: Made) -> None:
    folder = trial(*OFF, f"adapter={kind}", "orpo.learning_rate=0.05")
    assert run_trial(folder, 1) == "completed"
    status = folder.read_status()
    found = {row["strength"]: row["metrics"] for row in analyse(str(folder.path), [0.0, 0.5, 1.0], 0)["strengths"]}
    for name, value in found[1.0].items():
        assert value == pytest.approx(status.metrics[name], rel=1e-3, abs=1e-4), name
    for name in ("eval/log_odds_chosen", "eval/nll_loss", "eval/kl_base"):
        assert found[0.0][name] == pytest.approx(status.untrained[name], rel=1e-3, abs=1e-4), name
    assert 0 < found[0.5]["eval/kl_base"] < found[1.0]["eval/kl_base"]


def test_a_latent_switched_off_or_alone_is_the_bias_set_by_hand(trial: Made, tmp_path: Path) -> None:
    folder = trial(*OFF, "adapter=bias", "orpo.learning_rate=0.05")
    assert run_trial(folder, 1) == "completed"
    result = analyse(str(folder.path), [1.0], 3)
    assert len(result["latents"]) == 3
    tensors = load_file(folder.adapter / WEIGHTS)
    (key,) = tensors
    for row in result["latents"][:2]:
        number, bias = row["latent"], tensors[key]
        assert row["value"] == pytest.approx(float(bias[number]))
        alone = torch.zeros_like(bias)
        alone[number] = bias[number]
        for case, by_hand in (("without", bias - alone), ("alone", alone)):
            save_file({key: by_hand}, folder.adapter / WEIGHTS, {"format": "pt"})
            expected = analyse(str(folder.path), [1.0], 0)["strengths"][0]["metrics"]
            assert row[case] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        save_file({key: bias}, folder.adapter / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("kind", ["bias", "lora"])
def test_an_export_at_another_strength(kind: str, trial: Made, tmp_path: Path) -> None:
    folder = trial(*OFF, f"adapter={kind}", "orpo.learning_rate=0.002")
    assert run_trial(folder, 1) == "completed"
    exported = export(folder.adapter, tmp_path / "half", "merged", None, "float32", 0.5)
    model, tokenizer = load_model(str(folder.adapter), dtype="float32")
    ids = tokenizer("My parcel has not arrived yet.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
        with changed(model):
            set_strength(model, 0.5)
            half = model(ids).logits
        assert torch.equal(model(ids).logits, whole), "the adapter is what it was"
        theirs = AutoModelForCausalLM.from_pretrained(exported.folder, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(theirs, half, rtol=1e-3, atol=1e-3)
    assert 0.2 < float((half - base).norm() / (whole - base).norm()) < 0.8


@pytest.mark.slow
def test_the_command_and_the_report(launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = launch(
        "model=tiny", "data.train_size=24", "data.eval_size=8", "orpo.max_steps=2", "orpo.max_length=300",
        "sweep=reference", "sweep.run_cap=2", "tracker=disabled", "name=s", "launcher.threads=1", "launcher.poll_s=0.2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / "outputs" / "s"
    assert main(["analyze", str(sweep), "--strengths", "0,1", "--latents", "2"]) == 0
    said = capsys.readouterr().out
    assert "The adapter at other strengths" in said and "What the largest latents do" in said and "analysis.json" in said
    files = list(sweep.glob("trials/*/analysis.json"))
    assert len(files) == 1 and [row["strength"] for row in json.loads(files[0].read_text())["strengths"]] == [0, 1]
    assert main(["report", str(sweep)]) == 0
    page = (sweep / "report.html").read_text()
    assert "The winner at other strengths" in page and "What its largest latents do" in page


@pytest.mark.parametrize("bad", ["-1", "1,two", "inf", ""])
def test_bad_strengths(bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["analyze", str(tmp_path), f"--strengths={bad}"])
    assert ended.value.code == 2 and "must be a number of at least 0" in capsys.readouterr().err


def test_a_file_that_is_none_is_no_analysis(trial: Made) -> None:
    folder = trial(*OFF)
    assert read_analysis(folder) is None
    for content in ("{half", "[]", '{"strengths": []}'):
        folder.analysis.write_text(content)
        assert read_analysis(folder) is None
    result = {"strengths": [{"strength": 1.0, "metrics": {"eval/loss": 2.0}}], "latents": []}
    assert rows_by_strength(result, columns("eval/loss", result)) == [["1", "2.0000"]] and rows_by_latent(result, []) == []
