"""Every decoder-only family of transformers: TRL's numbers with a plain forward hook, or refused before any trial."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from helpers.plain_trl import orpo_rows
from helpers.trials import (
    OFF,
    Made,
    rows_of,
)
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from isaerft_sweep.errors import ModelError
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.worker_queue import Task, WorkerFolder
from isaerft_sweep.models.loading import load
from isaerft_sweep.models.random_model import byte_tokenizer
from isaerft_sweep.models.twin import count_parameters, small_twin
from isaerft_sweep.spec_fields import overrides
from isaerft_sweep.trial.prepare import prepare
from isaerft_sweep.trial.runner import run_trial
from isaerft_sweep.trial.worker import serve_trials

NOT_TEXT_ALONE = {
    "bailing_hybrid", "blt", "cpmant", "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified",
    "gemma4_unified_assistant", "git", "got_ocr2", "llama4", "mllama", "moshi", "moss_transcribe_diarize", "musicgen",
    "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "reformer", "rwkv", "trocr", "whisper", "xlm",
    "xlnet", "xlstm",
}  # fmt: skip
"""Models of pictures, sound or bytes, those whose text part is another entry, and some that take a minute for a step here."""
FAMILIES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NOT_TEXT_ALONE)
SEEN = (
    "gpt2", "mixtral", "gpt_oss", "falcon", "bloom", "mpt", "gptj", "gpt_neo", "opt", "olmoe", "qwen3_moe", "deepseek_v3",
    "qwen3_next", "gemma4_text", "gemma3n_text", "llama4_text", "mamba",
)  # fmt: skip
"""Families that once passed the check and then failed."""
EXACT = (
    "llama", "gemma2", "gpt2", "mixtral", "gpt_oss", "bloom", "gptj", "opt", "olmoe", "qwen3_moe", "phi3", "starcoder2", "glm4",
    "stablelm", "granite", "cohere2", "olmo2", "recurrent_gemma", "lfm2",
)  # fmt: skip
"""Families that must be trained, not refused."""
USUAL = {*SEEN, "granite", "cohere2", "stablelm", "glm4", "recurrent_gemma", "lfm2", "phimoe"}
"""What every run of the tests tries. ``pytest --every-family tests/test_families.py`` tries all, in ten minutes."""
FOUR_LAYERS = {"num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 4}


def tiny(family: str, **more: Any) -> Any:
    """A small random model of four layers; skips where transformers cannot make one of these sizes."""
    config_class = CONFIG_MAPPING[family]
    fields = getattr(config_class, "__dataclass_fields__", {})
    few = {name: value for name, value in FOUR_LAYERS.items() if name in fields}
    few |= {"gpt_neo": {"attention_types": [[["global", "local"], 2]]}, "gemma3n_text": {"num_kv_shared_layers": 0}}.get(
        family, {}
    )
    try:
        config = config_class(**few)
        for name, value in more.items():
            setattr(config, name, value)
        made = small_twin(config)
    except Exception as error:  # each family has rules of its own
        pytest.skip(f"no config of four layers: {str(error)[:80]}")
    if made is None:
        pytest.skip("no small model of these sizes")
    return made


def saved(family: str, folder: Path, **more: Any) -> Path:
    model = tiny(family, **more)
    vocabulary, width = model.get_input_embeddings().weight.shape
    if vocabulary < 262 or width != 64:
        pytest.skip("its sizes are its own")
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for name, value in more.items():
        config = json.loads((folder / "config.json").read_text())
        assert config[name] == value
    return folder


def options(folder: Path, width: int, *more: str) -> tuple[str, ...]:
    site = f"adapter.sites=[{{layer: 2, sae_release: isaerft-sweep, sae_id: random-{width}x256}}]"
    named = overrides({"model.name": str(folder), "model.source": "hub", "model.architecture": None})
    less = ("data.train_size=8", "data.eval_size=4", "orpo.batch_size=2", "orpo.max_length=160")
    return (*OFF, *named, site, *less, "orpo.max_steps=2", "orpo.learning_rate=0.1", "orpo.eval_untrained=never", *more)


def assert_trls(folder: TrialFolder, given: list[torch.Tensor], tmp_path: Path) -> None:
    mine = list(given)
    given.clear()
    theirs = orpo_rows(folder.read_spec().experiment, tmp_path / "trl")
    for found, expected in zip(mine, given, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-3
    ours = rows_of(folder)
    assert len(ours) == len(theirs) == 3
    for row, plain in zip(ours, theirs, strict=True):
        names = {
            key: f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}" for key in plain if "logits" not in key
        }
        compared = {key: name for key, name in names.items() if name in row}
        assert len(compared) >= 8
        for key, name in compared.items():
            assert row[name] == pytest.approx(plain[key], rel=5e-4, abs=5e-5), (row["step"], name)


@pytest.fixture
def given_gradients(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    yield gradients


def check_family(family: str, trial: Made, tmp_path: Path, seen: list[torch.Tensor], **more: Any) -> str:
    """``exact`` or ``refused``."""
    folder = saved(family, tmp_path / "model", **more)
    width = (
        load(trial(*OFF, name="any").read_spec().experiment.model, None)
        and tiny(family).get_input_embeddings().weight.shape[-1]
    )
    one = trial(*options(folder, width), name="trial")
    try:
        prepare(one.read_spec().experiment)
    except ModelError as error:
        assert len(str(error).splitlines()) == 1
        return "refused"
    seen.clear()
    assert run_trial(one, 1) == "completed", one.read_status()
    assert_trls(one, seen, tmp_path)
    return "exact"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.long
def test_every_family_has_trls_numbers_or_is_refused(
    family: str, trial: Made, tmp_path: Path, given_gradients: list[torch.Tensor], request: pytest.FixtureRequest
) -> None:
    if family not in USUAL and not request.config.getoption("--every-family"):
        pytest.skip("pytest --every-family tries it")
    outcome = check_family(family, trial, tmp_path, given_gradients)
    assert outcome == "exact" or family not in EXACT


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "granitemoe", "olmoe"])
@pytest.mark.parametrize("layer", [2, 3])
def test_the_routers_loss_is_trls(
    family: str,
    layer: int,
    trial: Made,
    tmp_path: Path,
    given_gradients: list[torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In every step and in the evaluation; nothing of it is lost to reuse, at the last layer neither."""
    folder = saved(family, tmp_path / "model", output_router_logits=True, router_aux_loss_coef=0.5)
    one = trial(*options(folder, 64, f"adapter.sites.0.layer={layer}"), name="trial")
    assert prepare(one.read_spec().experiment)
    given_gradients.clear()
    assert run_trial(one, 1) == "completed", one.read_status()
    assert "output_router_logits=true" in capsys.readouterr().out
    mine, ours = list(given_gradients), rows_of(one)
    given_gradients.clear()
    theirs = orpo_rows(one.read_spec().experiment, tmp_path / "trl")
    for found, expected in zip(mine, given_gradients, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-3
    for row, plain in zip(ours, theirs, strict=True):
        for key in ("loss", "eval_loss", "nll_loss", "eval_nll_loss", "log_odds_chosen"):
            name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
            if key in plain:
                assert row[name] == pytest.approx(plain[key], rel=5e-4), name
    evaluated = ours[-1]
    plainly = evaluated["eval/nll_loss"] - one.read_spec().experiment.orpo.beta * evaluated["eval/log_odds_ratio"]
    assert evaluated["eval/loss"] - plainly > 0.1, "the router's loss is in it"


@pytest.mark.slow
@pytest.mark.parametrize("router", [False, True])
def test_co_batched_trials_of_a_mixture_of_experts(router: bool, trial: Made, tmp_path: Path) -> None:
    """Together where that is exact, one after the other where the router's loss needs the whole model."""
    folder = saved("mixtral", tmp_path / "model", output_router_logits=router, router_aux_loss_coef=0.5)
    alone, *both = (
        trial(*options(folder, 64, f"orpo.beta={beta}", "launcher.trials_per_pass=2"), name=name)
        for name, beta in (("alone", 0.5), ("a", 0.5), ("b", 2.0))
    )
    assert run_trial(alone, 1) == "completed"
    worker = WorkerFolder(tmp_path / "worker")
    for one in both:
        worker.claim(Task(str(one.path), 1), room=None)
    worker.claim(Task(None), room=None)
    assert serve_trials(worker, trials_per_pass=2) == 2
    assert [one.read_status().state for one in both] == ["completed"] * 2
    for row, expected in zip(rows_of(both[0]), rows_of(alone), strict=True):
        assert row == pytest.approx(expected, rel=5e-4, abs=5e-5)


def test_a_model_without_a_residual_stream_is_refused(experiment: Callable[..., Any], tmp_path: Path) -> None:
    """Gemma 3n hands four streams from layer to layer."""
    folder = saved("gemma3n_text", tmp_path / "model")
    with pytest.raises(ModelError, match=r"returns \[.*\] and not \[batch, position, hidden\]"):
        prepare(experiment(*TINY, *options(folder, 64)))


def test_random_weights_are_said(experiment: Callable[..., Any]) -> None:
    """Also where the model's name is that of another one."""
    said = prepare(experiment(*TINY, "model.name=org/model"))["model"]
    assert said.startswith("org/model with random weights: 4 layers")


def test_a_model_that_sees_later_tokens_is_refused(experiment: Callable[..., Any], tmp_path: Path) -> None:
    folder = saved("bert", tmp_path / "bert")
    with pytest.raises(ModelError, match="the model must be causal, so that a token sees only earlier ones"):
        prepare(experiment(*options(folder, 64)))


def test_the_check_needs_no_weights_of_a_large_model() -> None:
    config = CONFIG_MAPPING["mixtral"]()
    assert count_parameters(config) > 4e10
    twin = small_twin(config)
    assert twin is not None and twin.config.num_hidden_layers == config.num_hidden_layers
    assert sum(parameter.numel() for parameter in twin.parameters()) < 1e7


TEXT = {
    "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 2048, "vocab_size": 262, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
OF_PRESETS = {
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 64, "query_pre_attn_scalar": 16},
        "vision_config": VISION,
        "image_token_index": 5, "boi_token_index": 3, "eoi_token_index": 4, "mm_tokens_per_image": 4,
    },
    "qwen3_5_text": {**TEXT, **LINEAR},
}  # fmt: skip
"""Architectures of presets that need a config of their own: a multimodal wrapper (Gemma 3 from 4B on), linear attention."""


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(OF_PRESETS))
def test_the_architectures_of_presets_have_trls_numbers(
    family: str, trial: Made, tmp_path: Path, gradients: list[torch.Tensor]
) -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**OF_PRESETS[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    folder = trial(*options(tmp_path / "model", 64))
    assert run_trial(folder, 1) == "completed"
    assert_trls(folder, gradients, tmp_path)
