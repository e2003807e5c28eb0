"""Bad input gets one clear error before any trial is dispatched, a non-zero exit, and loses nothing."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, events
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from isaerft_sweep.controller.preflight import check_disk
from isaerft_sweep.errors import DataError, FolderError, IsaerftError
from isaerft_sweep.models import random_model
from isaerft_sweep.models.random_model import byte_tokenizer
from isaerft_sweep.spec_fields import overrides
from isaerft_sweep.specs import Experiment
from isaerft_sweep.trial.data import load_pairs
from isaerft_sweep.trial.prepare import prepare

Composed = Callable[..., Experiment]
OFF = (*TINY, "name=s", "sweep.run_cap=1", "tracker=disabled")
GOOD_ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}


def refused(done: subprocess.CompletedProcess[str], tmp_path: Path, said: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in done.stderr, done.stderr
    trials = tmp_path / "outputs" / "s" / "trials"
    assert not trials.exists() or not list(trials.iterdir()), "no trial was made"


def prepare_refuses(composed: Experiment, said: str) -> None:
    """What the preflight's process does; ``test_what_the_preflight_finds_is_the_command_s_error`` starts it."""
    with pytest.raises(IsaerftError, match=re.escape(said)):
        prepare(composed)


@pytest.mark.slow
def test_what_the_preflight_finds_is_the_command_s_error(launch, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text(json.dumps(GOOD_ROW) + "\n{oops\n")
    refused(launch(*OFF, "model.architecture=gpt9"), tmp_path, "model.architecture is unknown: 'gpt9'")
    refused(launch(*OFF, "data=jsonl", "data.path=broken.jsonl"), tmp_path, "line 2: not valid JSON")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (("model=gemma-2-2b", "orpo.max_length=64"), "'google/gemma-2-2b' could not be loaded"),
        (("model.architecture=gpt9",), "model.architecture is unknown: 'gpt9'"),
        (("data=ultrafeedback",), "'trl-lib/ultrafeedback_binarized' (train[:1000]) could not be loaded"),
        (("adapter.sites.0.layer=4",), "between 0 and 3 for this model but got 4"),
        (("adapter.sites.0.sae_id=random-32x64",), "hidden size 64, but isaerft-sweep/random-32x64 reads 32"),
        (("adapter.sites.0.sae_id=mine",), "has no SAE 'mine'"),
        (("data=jsonl", "data.path=nowhere.jsonl"), "/nowhere.jsonl'"),
    ],
)  # fmt: skip
def test_what_the_preflight_finds(override: tuple[str, ...], said: str, experiment: Composed) -> None:
    prepare_refuses(experiment(*OFF, *override), said)


@pytest.mark.parametrize(
    ("name", "lines", "said"),
    [
        ("columns.jsonl", [{"prompt": "p", "answer": "c"}], "line 1: a row must have chosen and rejected but has columns ['answer', 'prompt']"),
        ("broken.jsonl", [GOOD_ROW, "{oops"], "line 2: not valid JSON"),
        ("types.jsonl", [{**GOOD_ROW, "chosen": 5}], "chosen must be text or chat messages but got 5"),
        ("mixed.jsonl", [{**GOOD_ROW, "chosen": [{"role": "assistant", "content": "c"}]}], "must all be text or all be chat messages"),
        ("empty.jsonl", [], "split of files must have at least one pair but is empty"),
        ("few.jsonl", [GOOD_ROW], "the train split of files must have at least one pair but is empty"),
        ("long.jsonl", [{**GOOD_ROW, "prompt": f"{i} " + "long " * 99} for i in range(20)], "every prompt fills orpo.max_length=300"),
        ("data.csv", [], "must end in .jsonl, .jsonl.gz or .parquet"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_data(name: str, lines: list, said: str, experiment: Composed, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    prepare_refuses(experiment(*OFF, "data=jsonl", f"data.path={path}", "data.eval_size=8"), said)


def test_a_disk_without_room(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"must have 1e\+06 GB free \(launcher.min_free_gb\) but has"):
        check_disk(tmp_path / "not" / "yet", 1e6)


def test_a_name_that_is_no_folder_name(launch, tmp_path: Path) -> None:
    refused(launch(*OFF, "name=a/b"), tmp_path, "name must be usable as a folder name but got 'a/b'. Try name=b.")


def test_an_agent_that_names_no_run(launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    refused(launch(*OFF), tmp_path, "WANDB_SWEEP_ID is set")


def test_a_folder_with_other_files(launch, tmp_path: Path) -> None:
    other = tmp_path / "outputs" / "s"
    other.mkdir(parents=True)
    (other / "thesis.txt").write_text("mine")
    refused(launch(*OFF), tmp_path, "holds files but no sweep")
    assert (other / "thesis.txt").read_text() == "mine"


@pytest.mark.slow
def test_another_sweeps_folder_a_broken_journal_and_a_torn_line(launch, tmp_path: Path) -> None:
    assert launch(*OFF).returncode == 0
    sweep = tmp_path / "outputs" / "s"
    journal = sweep / "journal.jsonl"
    before = journal.read_bytes()

    done = launch(*OFF, "orpo.max_steps=5")
    assert done.returncode == 2 and "holds another sweep" in done.stderr and journal.read_bytes() == before

    lines = before.splitlines(keepends=True)
    journal.write_bytes(lines[0] + b'{"event": "tri\n' + b"".join(lines[1:]))
    damaged = journal.read_bytes()
    done = launch(*OFF)
    assert done.returncode == 2 and "journal.jsonl, line 2 is not a journal entry" in done.stderr
    assert "Traceback" not in done.stderr and journal.read_bytes() == damaged

    journal.write_bytes(before + b'{"event": "tri')  # a crash in the middle of a write: never acted on
    done = launch(*OFF)
    assert done.returncode == 0 and journal.read_bytes() == before
    assert len([e for e in events(sweep) if e["event"] == "dispatch"]) == 1


def test_a_place_that_cannot_hold_a_sweep(launch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(launch(*OFF, "output=file/below"), tmp_path, "cannot be written or locked")


def test_grid_over_a_continuous_parameter(launch, tmp_path: Path) -> None:
    refused(
        launch(*OFF, "sweep.method=grid"), tmp_path, "method grid needs a finite set but got distribution log_uniform_values"
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (("orpo.optimizer=adamw_troch",), "orpo.optimizer is unknown: adamw_troch. Did you mean 'adamw_torch'"),
        (("adapter.hidden_size=8",), "hidden_size must go with kind mlp but got 8 with kind=bias"),
    ],
)  # fmt: skip
def test_settings_that_would_fail_in_every_trial(override: tuple[str, ...], said: str, experiment: Composed) -> None:
    prepare_refuses(experiment(*OFF, *override), said)


def test_a_torn_archive_and_rows_of_different_form(experiment, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    whole = gzip.compress(json.dumps(GOOD_ROW).encode() * 500)
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    rows = [{**GOOD_ROW, "prompt": f"p{i}"} for i in range(20)]
    chat = [{name: [{"role": "user", "content": text}] for name, text in row.items()} for row in rows]
    implicit = {"chosen": "same beginning: c", "rejected": "same beginning: r"}
    (tmp_path / "forms.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, *chat]))
    (tmp_path / "implicit.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [implicit, GOOD_ROW] * 20))
    said = {"torn.jsonl.gz": "cannot be read", "forms.jsonl": "every row must have a prompt"}
    for name, words in said.items():
        composed = experiment("model=tiny", "data=jsonl", f"data.path={tmp_path / name}", "data.eval_size=4")
        with pytest.raises(DataError, match=words):
            load_pairs(composed.data, tokenizer, 300)
    composed = experiment("model=tiny", "data=jsonl", f"data.path={tmp_path / 'implicit.jsonl'}", "data.eval_size=4")
    pairs = load_pairs(composed.data, tokenizer, 300)
    assert set(pairs.train["prompt"]) | set(pairs.evaluation["prompt"]) == {"p", "same beginning:"}


def test_files_are_looked_at_before_torch_is_loaded(experiment: Composed, tmp_path: Path) -> None:
    """Missing, of another kind or broken: told at once, by the process that has no torch."""
    (tmp_path / "broken.jsonl").write_text("{oops\n")
    (tmp_path / "data.csv").write_text("a,b\n")
    code = (
        "import json, sys\nfrom isaerft_sweep.config.compose import compose\n"
        "from isaerft_sweep.controller.preflight import check_trial_needs\nfrom isaerft_sweep.errors import IsaerftError\n"
        "import subprocess\nsubprocess.Popen = None\n"  # the process that loads torch must not be started
        "try: check_trial_needs(compose(sys.argv[1:]))\n"
        "except IsaerftError as error: print(error)\n"
        "print({'torch', 'transformers', 'datasets', 'sae_lens'} & set(sys.modules))"
    )
    cases = {
        "data.path=nowhere.jsonl": "must be a file that exists",
        f"data.path={tmp_path}/data.csv": "must end in .jsonl",
        f"data.path={tmp_path}/broken.jsonl": "line 1: not valid JSON",
        "adapter.sites=[{layer: 2, sae_path: nowhere}]": "where there is no cfg.json",
    }
    for override, said in cases.items():
        data = ["data=jsonl"] if override.startswith("data") else []
        done = subprocess.run(
            [sys.executable, "-c", code, "model=tiny", *data, override], capture_output=True, text=True, check=True
        )
        lines = done.stdout.splitlines()
        assert said in lines[0] and lines[-1] == "set()", done.stdout


def with_tokenizer(folder: Path, change: Callable[[PreTrainedTokenizerFast], object], **config: int) -> tuple[str, ...]:
    """Options for a small model with a tokenizer that is changed."""
    random_model.make("gpt_neox", folder)
    tokenizer = byte_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return ("model.source=hub", *overrides({"model.name": str(folder), "model.architecture": None}))


def test_a_tokenizer_that_does_not_go_with_the_model(experiment: Composed, tmp_path: Path) -> None:
    """Every trial would fail, three times each."""

    def without_end(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.eos_token = None

    prepare_refuses(
        experiment(*OFF, *with_tokenizer(tmp_path / "no-end", without_end)), "must have an end-of-sequence token"
    )

    def larger(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.add_tokens(["<|more|>"])
        tokenizer.chat_template = "<|more|>" + str(tokenizer.chat_template)

    options = with_tokenizer(tmp_path / "larger", larger)
    prepare_refuses(experiment(*OFF, *options), "whose 262 embeddings are for ids up to 261, but that of")

    def unused(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.add_tokens(["<|more|>"])

    assert prepare(experiment(*OFF, *with_tokenizer(tmp_path / "unused", unused)))["pairs"], "what no text has harms nobody"


def test_positions_that_a_model_does_not_have(experiment: Composed, tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=4, n_head=4, n_positions=64, vocab_size=262)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    named = overrides({"model.name": str(tmp_path / "model"), "model.architecture": None})
    prepare_refuses(experiment(*OFF, "model.source=hub", *named), "orpo.max_length must be at most 64 for this model")
