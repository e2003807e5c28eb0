"""What leaves a sweep: exports, uploads and cards that others can load; each form gives the trained trial's logits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.stand_ins import StandInHub, served
from helpers.trials import Made
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import isaerft_sweep.adapter  # noqa: F401  (what a user of an adapter repository imports)
from isaerft_sweep.adapter import load_model
from isaerft_sweep.cli import main
from isaerft_sweep.errors import FolderError, ModelError
from isaerft_sweep.journal.atomic_files import write_json
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.journal.layout import SweepFolder, TrialFolder
from isaerft_sweep.models.loading import load
from isaerft_sweep.publish.export import export
from isaerft_sweep.results.card.model_card import make_card, refresh_cards
from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.spec_fields import to_dict
from isaerft_sweep.trial.runner import run_trial

pytestmark = pytest.mark.slow  # nearly all of them train a trial first
FORMS = {"llama": "merged", "gemma2": "standalone"}
IDS = torch.arange(6, 40)[None]


@pytest.fixture
def trained(trial: Made) -> Callable[..., TrialFolder]:
    """A completed trial whose base model is a folder that its name alone can load, as one from the Hub is."""

    def made(family: str = "llama", *options: str, name: str = "trained") -> TrialFolder:
        folder = trial("tracker=disabled", f"model.architecture={family}", "orpo.learning_rate=0.3", *options, name=name)
        spec = folder.read_spec()
        load(spec.experiment.model, None)  # makes the folder
        raw = to_dict(spec)
        raw["experiment"]["model"].update(
            name=str(Path(os.environ["ISAERFT_CACHE"]) / "models" / f"tiny-{family}"), source="hub"
        )
        write_json(folder.spec, raw)
        assert run_trial(folder, 1) == "completed", folder.read_status()
        return folder

    return made


def in_a_clean_process(code: str, cwd: Path, *, without_package: bool) -> str:
    """Run ``code`` as somebody else would; ``without_package``: where importing ours fails."""
    blocked = "import sys; sys.modules['isaerft_sweep'] = None\n" if without_package else ""
    done = subprocess.run([sys.executable, "-c", blocked + code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOGITS = """\
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code={code}).eval()
with torch.no_grad():
    torch.save(model(torch.arange(6, 40)[None]).logits, "{out}")
"""


@pytest.mark.parametrize(("family", "form"), FORMS.items())
def test_an_export_gives_the_trials_logits_without_this_package(
    family: str, form: str, trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(family)
    model, tokenizer = load_model(str(folder.adapter))
    assert main(["export", str(folder.path), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "out") in said and form in said
    in_a_clean_process(
        LOGITS.format(code=form == "standalone", out=tmp_path / "logits.pt"), tmp_path / "out", without_package=True
    )
    with torch.no_grad():
        expected, base = model(IDS).logits, None
        with model.disable_adapter():
            base = model(IDS).logits
    found = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 1e-2, "the adapter does something"

    card = (tmp_path / "out" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None and "isaerft_sweep" not in code[1]
    assert in_a_clean_process(code[1], tmp_path / "out", without_package=True).strip(), "the quick start runs as printed"
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert tokenizer("Hello").input_ids == AutoTokenizer.from_pretrained(tmp_path / "out")("Hello").input_ids


@pytest.mark.parametrize(("family", "form"), FORMS.items())
def test_generation_with_cache_batches_and_left_padding(family: str, form: str, trained: Any, tmp_path: Path) -> None:
    folder = trained(family)
    made = export(folder.adapter, tmp_path / "out", form, None)
    model, tokenizer = load_model(str(folder.adapter))
    exported = AutoModelForCausalLM.from_pretrained(made.folder, trust_remote_code=True).eval()
    tokenizer.padding_side = "left"
    batch = tokenizer(
        ["Hello there", "A much longer line of text, so that the other is padded"], return_tensors="pt", padding=True
    )
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    outputs = [m.generate(**batch, **settings, use_cache=cache) for m in (model, exported) for cache in (True, False)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    alone = tokenizer("Hello there", return_tensors="pt")
    single = exported.generate(**alone, **settings)
    assert torch.equal(single[0, alone["input_ids"].shape[1] :], outputs[0][0, batch["input_ids"].shape[1] :])


@pytest.mark.parametrize(("family", "form"), FORMS.items())
def test_bfloat16(family: str, form: str, trained: Any, tmp_path: Path) -> None:
    folder = trained(family)
    model, _ = load_model(str(folder.adapter), dtype="bfloat16")
    made = export(folder.adapter, tmp_path / "out", form, None, dtype="bfloat16")
    exported = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.bfloat16, trust_remote_code=True).eval()
    with torch.no_grad():
        expected, found = model(IDS).logits, exported(IDS).logits
    assert found.dtype == torch.bfloat16
    if form == "standalone":
        assert torch.equal(found, expected), "rounded at the same place: equal to the last bit"
    else:  # the bias is rounded to bfloat16 once more
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("kind", ["bias", "scale", "linear", "mlp"])
def test_pipelines_take_an_adapter_repository(kind: str, trained: Any) -> None:
    folder = trained("gemma2", f"adapter={kind}")
    asked = [{"role": "user", "content": "Hello"}]
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    generator = pipeline("text-generation", model=str(folder.adapter))
    model, tokenizer = load_model(str(folder.adapter))
    with torch.no_grad():
        torch.testing.assert_close(generator.model(IDS).logits, model(IDS).logits)
    ours = pipeline("text-generation", model=model, tokenizer=tokenizer)(asked, **settings)
    assert generator(asked, **settings) == ours


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("kind", ["scale", "linear", "mlp"])
def test_every_kind_can_be_exported_with_its_code(kind: str, family: str, trained: Any, tmp_path: Path) -> None:
    made = export(trained(family, f"adapter={kind}").adapter, tmp_path / "out", None, None)
    assert made.form == "standalone" and made.difference < 1e-5
    generator = pipeline("text-generation", model=str(made.folder), trust_remote_code=True)
    assert generator("Hello", max_new_tokens=4)[0]["generated_text"].startswith("Hello")


@pytest.mark.parametrize("sae", ["jumprelu", "topk"])
def test_the_encoders_of_real_saes_are_exported(sae: str, saes: dict[str, str], trained: Any, tmp_path: Path) -> None:
    site = f"adapter.sites=[{{layer: 1, sae_path: {saes[sae]}}}, {{layer: 3, sae_path: {saes[sae]}}}]"
    folder = trained("gemma2", "adapter=scale", site)
    assert export(folder.adapter, tmp_path / "out", None, None).difference < 1e-5


def test_without_its_code_a_standalone_export_does_not_load(trained: Any, tmp_path: Path) -> None:
    made = export(trained("gemma2").adapter, tmp_path / "out", None, None)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(made.folder, trust_remote_code=False)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained("gemma2")
    assert main(["export", str(folder.path), "--merged", "--out", str(tmp_path / "out")]) == 2
    assert "merging must be exact" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(FolderError, match="must be empty"):
        export(folder.adapter, tmp_path / "full", None, None)
    with pytest.raises(FolderError, match="Choose"):
        export(folder.adapter, Path("/proc/nowhere/out"), None, None)
    monkeypatch.setattr(
        "isaerft_sweep.publish.export.write_standalone", lambda model, path: model.unload().save_pretrained(path)
    )
    with pytest.raises(ModelError, match="must give the adapter's logits"):
        export(folder.adapter, tmp_path / "out", None, None)
    weights = load_file(folder.adapter / "adapter_model.safetensors")
    # an adapter so weak that leaving it out passes for rounding
    save_file({key: 1e-4 * tensor for key, tensor in weights.items()}, folder.adapter / "adapter_model.safetensors")
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ModelError, match=r"100% of what the adapter changes is lost"):
            export(folder.adapter, tmp_path / "out", None, None, dtype)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "trained"]
    assert main(["export", str(tmp_path)]) == 2 and "none of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("adapter_config.json", b'{"peft_type": "IA3", "target_modules": ["q_proj"]}', "must be of type ISAERFT or LORA"),
        ("adapter_config.json", b'{"peft_type": "NOTHING"}', "that can be read"),
        ("adapter_config.json", b"[]", "that can be read"),
        ("adapter_config.json", b"{half", "that can be read"),
        ("adapter_model.safetensors", b"cut short", "cannot be read"),
    ],
)
def test_a_broken_or_foreign_adapter(
    name: str, content: bytes, words: str, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained()
    (folder.adapter / name).write_bytes(content)
    for command in (["export", str(folder.adapter)], ["generate", str(folder.adapter), "--prompt", "Hello"]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said, said
    assert main(["push", str(folder.adapter), "--dry-run"]) == 2 if name == "adapter_config.json" else True
    assert main(["card", str(folder.path)]) == 2 if name != "adapter_config.json" else True


# ---------------------------------------------------------------- push


@pytest.fixture
def publishable(trained: Any) -> TrialFolder:
    """A trial whose adapter names its base by a name on the Hub."""
    folder = trained()
    config = json.loads((folder.adapter / "adapter_config.json").read_text())
    write_json(folder.adapter / "adapter_config.json", {**config, "base_model_name_or_path": "someone/tiny-llama"})
    return folder


def push(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command with the real client; its settings are read when it is imported, so in a process of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env = {**kept, "HF_HOME": str(folder / ".hf"), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-m", "isaerft_sweep.cli", "push", str(folder), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_push_uploads_everything_and_the_tags(publishable: TrialFolder) -> None:
    hub = StandInHub("hf_secret")
    with served(hub) as address:
        done = push(publishable.path, "--private", HF_ENDPOINT=address, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    spec = publishable.read_spec()
    assert spec.model_name in done.stdout and "hf_secret" not in done.stdout + done.stderr
    assert (
        "(private)" in done.stdout
        and hub.created[0]["name"] == spec.model_name
        and hub.created[0]["visibility"] == "private"
    ), hub.created
    sent = {p.name for p in publishable.adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= sent == set(hub.files)
    for name, content in hub.files.items():
        assert content == (publishable.adapter / name).read_bytes(), name
    front = yaml.safe_load(hub.files["README.md"].decode().split("---")[1])
    assert front["tags"] == list(spec.tags) and set(spec.tags) >= {"generated_from_trainer", "isaerft", "lr_0.3", "beta_1.0"}


def test_what_can_go_wrong_with_a_push(publishable: TrialFolder) -> None:
    hub = StandInHub("hf_secret")
    with served(hub) as address:
        none = push(publishable.path, HF_ENDPOINT=address)
        wrong = push(publishable.path, HF_ENDPOINT=address, HF_TOKEN="hf_other")
        hub.broken = True
        broken = push(publishable.path, HF_ENDPOINT=address, HF_TOKEN="hf_secret")
    gone = push(publishable.path, HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="hf_secret")
    offline = push(publishable.path, HF_ENDPOINT=address, HF_TOKEN="hf_secret", HF_HUB_OFFLINE="1")
    for done, words in ((none, "hf auth login"), (wrong, "did not take it"), (broken, "did not take it"),
                        (gone, "Check the network"), (offline, "did not take it")):  # fmt: skip
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not hub.files


def test_a_private_push_does_not_go_to_a_public_repository(publishable: TrialFolder) -> None:
    hub = StandInHub("hf_secret")
    hub.existing["lab/known"] = False
    with served(hub) as address:
        refused = push(publishable.path, "--repo", "lab/known", "--private", HF_ENDPOINT=address, HF_TOKEN="hf_secret")
        assert not hub.files
        done = push(publishable.path, "--repo", "lab/known", HF_ENDPOINT=address, HF_TOKEN="hf_secret")
    assert refused.returncode == 2 and "is there already and public" in refused.stderr
    assert done.returncode == 0 and "(public)" in done.stdout and hub.files


def test_a_dry_run_needs_no_token_and_tells_all(publishable: TrialFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(publishable.path), "--repo", "lab/best", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "nothing was uploaded to lab/best" in said and "adapter_model.safetensors" in said and "lr_0.3" in said


def test_what_nobody_else_could_load_is_not_pushed(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained()
    assert main(["push", str(folder.path), "--dry-run"]) == 2
    assert "base model must be a name on the Hub" in capsys.readouterr().err
    config = json.loads((folder.adapter / "adapter_config.json").read_text())
    sites = [{"layer": 2, "sae_path": "/data/sae"}]
    write_json(folder.adapter / "adapter_config.json", {**config, "base_model_name_or_path": "a/b", "sites": sites})
    assert main(["push", str(folder.path), "--dry-run"]) == 2
    assert "the folder '/data/sae' of this machine" in capsys.readouterr().err
    write_json(folder.adapter / "adapter_config.json", {**config, "base_model_name_or_path": "a/b"})
    assert main(["push", str(folder.path), "--repo", "not a name", "--dry-run"]) == 2
    assert "by the Hub's rules" in capsys.readouterr().err
    (folder.adapter / "README.md").write_text("---\nmodel_name: [broken\n---\n")
    assert main(["push", str(folder.path), "--dry-run"]) == 2
    assert "must begin with YAML" in capsys.readouterr().err
    (folder.adapter / "README.md").unlink()
    assert main(["push", str(folder.path), "--dry-run"]) == 2
    assert "must have a card" in capsys.readouterr().err


def test_an_export_can_be_pushed(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = export(trained().adapter, tmp_path / "out", None, None)
    assert main(["push", str(made.folder), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "model.safetensors" in said and "TINY-LLAMA-FT-ORPO-ISAERFT_run-tiny-llama" in said


# ---------------------------------------------------------------- cards


def test_the_card_is_valid_by_the_hubs_own_checks(trained: Any) -> None:
    folder = trained("llama", "tags=[smol-course]")
    card = ModelCard.load(folder.adapter / "README.md")
    spec, metrics = folder.read_spec(), folder.read_status().metrics
    results = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert results["Accuracy of preferring the chosen answer"] == pytest.approx(metrics["eval/rewards/accuracies"], abs=1e-6)
    assert card.data.model_name == spec.model_name and card.data.pipeline_tag == "text-generation"
    assert "base_model" not in card.data.to_dict(), "a folder of this machine is not a name that the Hub takes"


def test_a_card_of_ones_own_template(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained()
    assert main(["card"]) == 2 and "needs a trial's folder" in capsys.readouterr().err
    assert main(["card", "--fields"]) == 0
    template = tmp_path / "mine.jinja"
    template.write_text(capsys.readouterr().out.replace("# Model Card for", "# Lab notes on"))
    assert main(["card", str(folder.path), "--template", str(template)]) == 0
    assert "# Lab notes on" in folder.card.read_text() == (folder.adapter / "README.md").read_text()
    assert not folder.card_digest.exists(), "it is the user's own: no later run of the sweep writes over it"
    before = folder.card.read_text()
    for content, words in (
        ("{{ colour }}", "'colour' is undefined"),
        ("{% if %}", "not a valid Jinja template"),
        ("{{ beta + 1 }}", "Every field is text"),
        ("{% include 'other' %}", "cannot be filled"),
    ):
        template.write_text(content)
        assert main(["card", str(folder.path), "--template", str(template)]) == 2
        said = capsys.readouterr().err
        assert words in said and (content != "{{ colour }}" or "Fields: about, base_model_link" in said)
    assert main(["card", str(folder.path), "--template", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err and folder.card.read_text() == before, "nothing is lost"


def test_the_card_links_to_w_and_b(trained: Any) -> None:
    folder = trained()
    status = folder.read_status()
    links = {"url": "https://wandb.ai/e/p/runs/r1", "sweep_url": "https://wandb.ai/e/p/sweeps/s1", "offline": False}
    card = make_card(folder, replace(status, wandb=links), folder.adapter)
    assert "](https://wandb.ai/e/p/runs/r1)" in card and "wandb-github-badge" in card
    assert "Its sweep: https://wandb.ai/e/p/sweeps/s1" in card
    assert "Not tracked in W&B." in folder.card.read_text()


def test_the_sweep_writes_the_card_again_but_not_over_anybodys_own(trained: Any, tmp_path: Path) -> None:
    trial = trained()
    sweep = SweepFolder(tmp_path / "sweep")
    journal = Journal(sweep)
    journal.write("sweep", sweep_id="s1", question="q", metric="eval/log_odds_chosen", goal="maximize")
    journal.write("trial", index=0, name=trial.path.name, run_id="r0", params={"orpo.beta": 1.0}, unit={})
    journal.write("end", index=0, state="completed", metric=0.1, message="", seconds=3600.0, given_up=False)
    journal.close()
    (sweep.path / "trials").mkdir()
    trial.path.rename(sweep.trial("trained").path)
    trial = sweep.trial("trained")
    before = trial.card.read_text()
    assert "device time | 0.00" in before and "completed trials" not in before
    refresh_cards(read_sweep_folder(sweep.path))
    after = trial.card.read_text()
    assert "device time | 1.000 h" in after and "1 of 1 completed trials" in after
    assert (trial.adapter / "README.md").read_text() == after
    for path in (trial.adapter / "README.md", trial.card):
        path.write_text(path.read_text() + "\nMy own words.\n")
        refresh_cards(read_sweep_folder(sweep.path))
        assert "My own words." in path.read_text()


def test_a_card_of_an_unfinished_trial(trial: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trial()
    assert main(["card", str(folder.path)]) == 2
    assert "must be completed" in capsys.readouterr().err
    assert main(["card", str(tmp_path)]) == 2
    assert "neither" in capsys.readouterr().err
