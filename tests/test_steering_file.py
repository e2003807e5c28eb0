"""export --lm-eval: the real harness has the adapter's logits and runs a task with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.trials import OFF, Made

from isaerft_sweep.adapter import load_model
from isaerft_sweep.cli import main
from isaerft_sweep.errors import FolderError, ModelError
from isaerft_sweep.models.loading import load
from isaerft_sweep.publish.steering_file import write_steering_file
from isaerft_sweep.trial.runner import run_trial


@pytest.mark.parametrize("kind", ["bias", "vector", "random", "diffmean"])
def test_the_file_holds_the_adapters_vector(kind: str, trial: Made, tmp_path: Path) -> None:
    folder = trial(*OFF, f"adapter={kind}", "orpo.learning_rate=0.05")
    assert run_trial(folder, 1) == "completed"
    file, _ = write_steering_file(folder.adapter, tmp_path / "s.pt", None, 0.5)
    entries = torch.load(file, weights_only=True)
    assert list(entries) == ["layers.2"] and entries["layers.2"]["action"] == "add"
    model, tokenizer = load_model(str(folder.adapter), dtype="float32")
    ids = tokenizer("My parcel has not arrived yet.", return_tensors="pt")["input_ids"]
    base = load(folder.read_spec().experiment.model, None).model
    vector = entries["layers.2"]["steering_vector"]
    handle = base.model.layers[2].register_forward_hook(
        lambda _module, _args, output: (
            (output[0] + 2 * vector, *output[1:]) if isinstance(output, tuple) else output + 2 * vector
        )
    )
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    handle.remove()
    with pytest.raises(FolderError, match="must not exist yet"):
        write_steering_file(folder.adapter, tmp_path / "s.pt", None)
    with pytest.raises(FolderError, match=r"must end in \.pt"):
        write_steering_file(folder.adapter, tmp_path / "s.bin", None)


@pytest.mark.parametrize("kind", ["scale", "lora", "loreft"])
def test_other_kinds_are_refused(kind: str, trial: Made, tmp_path: Path) -> None:
    folder = trial(*OFF, f"adapter={kind}")
    assert run_trial(folder, 1) == "completed"
    with pytest.raises(ModelError, match="must be of kind bias, random, vector or diffmean"):
        write_steering_file(folder.adapter, tmp_path / "s.pt", None)


@pytest.mark.slow
def test_the_real_harness(trial: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason='needs pip install "isaerft-sweep[lm-eval]"')
    folder = trial(*OFF, "adapter=bias", "orpo.learning_rate=0.05")
    assert run_trial(folder, 1) == "completed"
    assert main(["export", str(folder.path), "--lm-eval", "--out", str(tmp_path / "s.pt")]) == 0
    assert "lm_eval --model steered --model_args pretrained=" in capsys.readouterr().out
    loaded = load(folder.read_spec().experiment.model, None)
    loaded.model.save_pretrained(tmp_path / "base")
    loaded.tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "task").mkdir()
    questions = [{"question": f"Is {i} a number?", "answer": 0} for i in range(6)]
    (tmp_path / "task" / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    task = {
        "task": "tiny", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "task" / "q.jsonl")}},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "answer",
        "doc_to_choice": [" yes", " no"], "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "task" / "tiny.yaml").write_text(yaml.safe_dump(task))
    ids = loaded.tokenizer("Is 3 a number?", return_tensors="pt")["input_ids"]
    code = f"""
import torch
from lm_eval import simple_evaluate
from lm_eval.models.hf_steered import SteeredModel
from lm_eval.tasks import TaskManager
model = SteeredModel(pretrained={str(tmp_path / "base")!r}, steer_path={str(tmp_path / "s.pt")!r}, device="cpu", dtype="float32")
torch.save(model.forward(torch.tensor({ids.tolist()})).logits, {str(tmp_path / "logits.pt")!r})
tasks = TaskManager(include_path={str(tmp_path / "task")!r})
result = simple_evaluate(model=model, tasks=["tiny"], task_manager=tasks, bootstrap_iters=0)
print("ACC", result["results"]["tiny"]["acc,none"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and "ACC " in done.stdout, done.stderr[-3000:]
    model, _ = load_model(str(folder.adapter), dtype="float32")
    with torch.no_grad():
        ours = model(ids).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), ours, rtol=1e-4, atol=1e-4)
