"""One trial: exact resume, divergence, and what it leaves behind."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from datasets import Dataset
from helpers.trials import OFF, Made, rows_of
from helpers.waiting import wait_for

from isaerft_sweep.adapter import load_model
from isaerft_sweep.adapter import sae as sae_module
from isaerft_sweep.adapter.sae import load_sae
from isaerft_sweep.errors import IsaerftError
from isaerft_sweep.journal.atomic_files import write_json
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.status_writer import Superseded
from isaerft_sweep.models.loading import load
from isaerft_sweep.paths import asset
from isaerft_sweep.spec_fields import to_dict
from isaerft_sweep.trial.data import load_pairs
from isaerft_sweep.trial.losses import OrpoLoss, PairLogps
from isaerft_sweep.trial.runner import run_trial


@pytest.mark.parametrize("kind", ["bias", "mlp"])
def test_a_resumed_trial_has_the_numbers_of_an_uninterrupted_one(kind: str, trial: Made) -> None:
    options = (*OFF, f"adapter={kind}", "orpo.max_steps=6", "orpo.eval_fraction=0.3", "orpo.gradient_accumulation=2")
    whole = trial(*options, name="whole")
    assert run_trial(whole, 1) == "completed"
    cut = trial(*options, name="cut")
    cut.ask_to_stop()
    for attempt in (1, 2, 3):  # stopped after its first step, then after one more, then left alone
        assert run_trial(cut, attempt) == ("completed" if attempt == 3 else "stopped")
        cut.begin_attempt(attempt + 1)
        if attempt == 1:
            cut.ask_to_stop()
    for mine, other in zip(rows_of(cut), rows_of(whole), strict=True):
        assert mine == other
    states = [(f.adapter / "adapter_model.safetensors").read_bytes() for f in (whole, cut)]
    assert states[0] == states[1], "the adapters are equal to the last bit"


@pytest.mark.parametrize("shipped", [False, True])
def test_an_adapters_first_weights_depend_on_the_seed_alone(shipped: bool) -> None:
    """Not on whether this process has read the SAE before, which draws random numbers of its own."""
    site = {"layer": 0, "sae_release": "isaerft-sweep", "sae_id": "random-64x256"}
    if shipped:
        site["sae_id"] = next(p.name for p in asset("sae").iterdir() if (p / "cfg.json").is_file())
    torch.manual_seed(1)
    expected = torch.rand(3)
    sae_module._load.cache_clear()
    for _ in range(2):
        torch.manual_seed(1)
        load_sae(site)
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_worker_goes_on_from_its_last_whole_checkpoint(trial: Made) -> None:
    options = (*OFF, "orpo.max_steps=60", "orpo.checkpoint_every_steps=5")
    whole = trial(*options, name="whole")
    assert run_trial(whole, 1) == "completed"
    cut = trial(*options, name="cut")
    code = f"from isaerft_sweep.dispatch.job import TrialJob; TrialJob({str(cut.path)!r}, 1, None)()"
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(cut.checkpoints.glob("checkpoint-*/.complete"))) > 0)
    worker.kill()
    worker.wait()
    assert cut.read_status().state == "running"
    half = cut.checkpoints / "checkpoint-999"  # what a kill in the middle of writing leaves
    half.mkdir()
    cut.begin_attempt(2)
    assert run_trial(cut, 2) == "completed"
    assert rows_of(cut) == rows_of(whole)


SEVERAL_WORKERS = """
import os, sys
import isaerft_sweep.trial.runner
from isaerft_sweep.dispatch.job import TrialJob

children = []
for folder in sys.argv[1:]:
    if (child := os.fork()) == 0:
        TrialJob(folder, 1, None)()
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("paced")
def test_a_signal_makes_a_checkpoint_and_stops(trial: Made) -> None:
    """Each of the four, to a process of its own."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    folders = [trial(*OFF, "orpo.max_steps=100000", name=number.name) for number in numbers]
    command = [sys.executable, "-c", SEVERAL_WORKERS, *(str(folder.path) for folder in folders)]
    workers = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for number, folder in zip(numbers, folders, strict=True):
        wait_for(lambda folder=folder: (folder.read_status().step or 0) > 0)
        os.kill(folder.read_status().pid, number)
    assert workers.wait(60) == 0
    for folder in folders:
        assert folder.read_status().state == "stopped"
        assert list(folder.checkpoints.glob("checkpoint-*/.complete"))


def test_a_newer_attempt_fences_off_an_older_one(trial: Made) -> None:
    folder = trial(*OFF)
    folder.begin_attempt(2)
    with pytest.raises(Superseded):
        run_trial(folder, 1)
    assert not folder.read_status()


def test_a_nan_ends_the_trial_with_a_clear_status(trial: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trial(*OFF)
    original, calls = OrpoLoss.pair_losses, itertools.count()

    def broken(self: OrpoLoss, logps: PairLogps) -> torch.Tensor:
        return original(self, logps) * (
            math.nan if next(calls) >= 2 + 2 else 1.0
        )  # the untrained evaluation is two calls: held-out and test pairs

    monkeypatch.setattr(OrpoLoss, "pair_losses", broken)
    assert run_trial(folder, 1) == "diverged"
    status = folder.read_status()
    assert "became nan at step 3" in status.message and "smaller learning rate" in status.message


def test_a_runaway_loss_ends_the_trial(trial: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trial(*OFF, "orpo.max_steps=20")
    original, calls = OrpoLoss.pair_losses, itertools.count()
    monkeypatch.setattr(OrpoLoss, "pair_losses", lambda self, logps: original(self, logps) + 2.0 ** (2 * next(calls)))
    assert run_trial(folder, 1) == "diverged"
    assert "more than 10 times the first loss" in folder.read_status().message
    assert folder.read_status().step < 10


def test_an_error_in_the_worker_is_reported_not_raised(trial: Made) -> None:
    folder = trial(*OFF, "data=jsonl", "data.path=/nowhere.jsonl")
    assert run_trial(folder, 1) == "failed"
    status = folder.read_status()
    assert status.user_error and "data.path must be a file that exists" in status.message


def test_what_a_trial_leaves(trial: Made) -> None:
    folder = trial("tracker=disabled", "tags=[smol-course,module_1]")
    assert run_trial(folder, 1) == "completed"
    status = folder.read_status()
    assert status.step == status.max_steps == 4 and status.metric == status.metrics["eval/log_odds_chosen"]
    assert set(status.untrained) >= {"eval/log_odds_chosen", "eval/rewards/accuracies"}
    assert {p.name for p in folder.adapter.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json", "chat_template.jinja",
    }  # fmt: skip
    environment = json.loads(folder.environment.read_text())
    assert {"torch", "transformers", "peft", "isaerft-sweep"} <= set(environment["packages"])
    assert not folder.checkpoints.exists()
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in folder.adapter.iterdir()), "others on the cluster can read it"


def test_the_card_has_all_that_the_published_card_has(trial: Made) -> None:
    folder = trial("tracker=offline", "tags=[smol-course,module_1]")
    spec = folder.read_spec()
    write_json(folder.spec, {**to_dict(spec), "tags": ["generated_from_trainer", "smol-course", "module_1", *spec.tags[1:]]})
    assert run_trial(folder, 1) == "completed"
    card = folder.card.read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "tiny-llama" and front["model_name"] == spec.model_name
    assert front["tags"] == [
        "generated_from_trainer", "smol-course", "module_1", "isaerft", "lr_0.03", "beta_1.0",
    ]  # fmt: skip
    assert {"library_name", "licence", "license", "pipeline_tag"} <= set(front)
    for wanted in (
        f"# Model Card for {spec.model_name}", "## Quick start", 'pipeline("text-generation"', "huggingface.co/papers/2403.07691",
        "### Framework versions", "- Transformers: ", "- Tokenizers: ", "@article{hong2024orpo", "@misc{vonwerra2022trl",
        spec.name, spec.run_id, spec.command, "random-64x256", "24 trained on, 8 held out, none left out, 0 cut",
    ):  # fmt: skip
        assert wanted in card, wanted
    assert (folder.adapter / "README.md").read_text() == card


@pytest.mark.slow
@pytest.mark.long
def test_the_quick_start_runs_as_printed(trial: Made) -> None:
    folder = trial(*OFF)
    spec = to_dict(folder.read_spec())
    made = str(Path(os.environ["ISAERFT_CACHE"]) / "models" / "tiny-llama")
    spec["experiment"]["model"].update(name=made, source="hub")  # a base model that its name alone can load
    write_json(folder.spec, spec)
    load(trial(*OFF, name="other").read_spec().experiment.model, None)  # makes it
    assert run_trial(folder, 1) == "completed"
    code = re.search(r"```python\n(.*?)```", folder.card.read_text(), re.DOTALL)
    assert code is not None
    done = subprocess.run([sys.executable, "-c", code[1]], cwd=folder.adapter, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_saved_adapter_gives_the_trained_models_logits(trial: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, kept = trial(*OFF), {}
    save = peft.PeftModel.save_pretrained

    def remember(model: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        ids = torch.arange(6, 40)[None]
        with torch.no_grad():
            kept["logits"] = model.eval()(ids).logits
        return save(model, path, *args, **kwargs)

    monkeypatch.setattr(peft.PeftModel, "save_pretrained", remember)
    assert run_trial(folder, 1) == "completed"
    model, _ = load_model(str(folder.adapter), base=folder.read_spec().experiment.model)
    with torch.no_grad():
        assert torch.equal(model(torch.arange(6, 40)[None]).logits, kept["logits"])


@pytest.mark.parametrize("form", ["text", "chat", "implicit"])
def test_data_forms(form: str, trial: Made, tmp_path: Path) -> None:
    def row(i: int) -> dict[str, Any]:
        if form == "text":
            return {"prompt": f"Say {i}. ", "chosen": f"Gladly: {i}", "rejected": "No."}
        prompt, good, bad = (
            {"role": r, "content": c} for r, c in (("user", f"{i}?"), ("assistant", f"{i}!"), ("assistant", "no"))
        )
        if form == "chat":
            return {"prompt": [prompt], "chosen": [good], "rejected": [bad]}
        return {"chosen": [prompt, good], "rejected": [prompt, bad]}

    data = Dataset.from_list([row(i) for i in range(40)])
    for suffix in ("jsonl", "jsonl.gz", "parquet"):
        path = tmp_path / f"{form}.{suffix}"
        data.to_parquet(path) if suffix == "parquet" else data.to_json(path, compression="gzip" if "gz" in suffix else None)
        folder = trial(*OFF, "data=jsonl", f"data.path={path}", "data.eval_size=8", "orpo.max_steps=1", name=suffix)
        assert run_trial(folder, 1) == "completed", folder.read_status()
    results = [rows_of(TrialFolder(tmp_path / suffix)) for suffix in ("jsonl", "jsonl.gz", "parquet")]
    assert results[0] == results[1] == results[2]


def test_prompts_that_fill_max_length_are_left_out_and_counted(experiment: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": "x" * (400 if i % 4 == 0 else 10) + str(i), "chosen": "yes", "rejected": "no"} for i in range(40)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    composed = experiment("model=tiny", "data=jsonl", f"data.path={path}", "data.eval_size=12")
    tokenizer = load(composed.model, None).tokenizer
    pairs = load_pairs(composed.data, tokenizer, max_length=100)
    assert pairs.dropped == 10 and len(pairs.train) + len(pairs.evaluation) == 30
    with pytest.raises(IsaerftError, match=r"every prompt fills orpo.max_length=5"):
        load_pairs(composed.data, tokenizer, max_length=5)


def test_no_prompt_is_on_both_sides_of_the_split(experiment: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"p{i // 5}", "chosen": f"a{i}", "rejected": "b"}) + "\n" for i in range(100))
    )
    composed = experiment("model=tiny", "data=jsonl", f"data.path={path}", "data.eval_size=20")
    pairs = load_pairs(composed.data, load(composed.model, None).tokenizer, 100)
    assert not set(pairs.train["prompt"]) & set(pairs.evaluation["prompt"])
    assert len(pairs.evaluation) == 20 and len(pairs.train) == 80


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "preferences_pandalm_742.jsonl"


@pytest.mark.skipif(not SHARED.is_file(), reason="the preference pairs beside the project are not on this machine")
def test_real_pairs_beside_the_project(trial: Made) -> None:
    folder = trial(*OFF, "data=jsonl", f"data.path={SHARED}", "orpo.max_steps=1", "orpo.max_length=400")
    assert run_trial(folder, 1) == "completed"
