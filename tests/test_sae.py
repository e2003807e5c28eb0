"""An SAE is the one of its place, whole and finite, or it is refused with one line."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig
from safetensors.torch import load_file, save_file

from isaerft_sweep.adapter import sae as sae_module
from isaerft_sweep.adapter.hook import check_hook, residual_layer, same_model
from isaerft_sweep.adapter.sae import load_sae
from isaerft_sweep.errors import ModelError
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.paths import asset
from isaerft_sweep.sae_folder import check_sae_folder
from isaerft_sweep.specs import Experiment, identity
from isaerft_sweep.trial.prepare import prepare

Composed = Callable[..., Experiment]
OFF = (*TINY, "tracker=disabled")


def saved(folder: Path, **metadata: Any) -> Path:
    """A small SAE as sae_lens saves it."""
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=96, metadata=SAEMetadata(**metadata)))
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 8
    sae.save_model(str(folder))
    return folder


def at(folder: Path, layer: int = 2, *more: str) -> tuple[str, ...]:
    return (*OFF, f"adapter.sites=[{{layer: {layer}, sae_path: '{folder}'}}]", *more)


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.2.hook_resid_post", 2),
        ("blocks.3.hook_resid_pre", 2),
        ("blocks.0.hook_resid_pre", -1),
        ("blocks.{layer}.hook_resid_post", 7),
        ("blocks.{layer}.hook_resid_pre", 6),
        ("model.layers.2", 2),
        ("model.layers.2.output", 2),
        ("model.layers.2.input", 1),
        ("transformer.h.11", 11),
        ("gpt_neox.layers.3", 3),
        ("blocks.2.hook_out", 2),
        ("resid_post_layer_12", 12),
        ("blocks.2.hook_mlp_out", None),
        ("blocks.2.hook_attn_out", None),
        ("blocks.2.hook_resid_mid", None),
        ("blocks.2.attn.hook_z", None),
        ("blocks.2.ln2.hook_normalized", None),
        ("model.layers.2.self_attn.o_proj.input", None),
        ("model.layers.2.post_feedforward_layernorm.output", None),
        ("hook_embed", None),
        ("ln_final.hook_normalized", None),
    ],
)  # fmt: skip
def test_the_place_that_a_hook_names(hook: str, layer: int | None) -> None:
    assert residual_layer(hook, 7) == layer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("google/gemma-2-2b", "gemma-2-2b", True),
        ("gpt2-small", "openai-community/gpt2", True),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped", True),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1", True),
        ("meta-llama/Llama-3.1-8B", "meta-llama/llama-3.1-8b", True),
        ("gemma-2-2b", "google/gemma-2-2b-it", False),
        ("gemma-2-2b", "google/gemma-2-9b", False),
    ],
)  # fmt: skip
def test_names_of_one_model(one: str, other: str, same: bool) -> None:
    assert same_model(one, other) == same_model(other, one) == same


def test_a_local_folder_has_the_name_of_its_model(tmp_path: Path) -> None:
    commit = tmp_path / "models--google--gemma-2-2b" / "snapshots" / ("0" * 40)
    for folder in (tmp_path / "gemma-2-2b", commit, tmp_path / "mine"):
        folder.mkdir(parents=True)
    assert same_model("gemma-2-2b", str(tmp_path / "gemma-2-2b/")) and same_model("google/gemma-2-2b", str(commit))
    assert not same_model("gemma-2-2b", str(tmp_path / "mine"))
    (tmp_path / "mine" / "config.json").write_text('{"_name_or_path": "google/gemma-2-2b"}')
    assert same_model("gemma-2-2b", str(tmp_path / "mine"))


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"hook_name": "blocks.2.hook_resid_post", "model_name": "tiny-llama"},
        {"hook_name": "blocks.3.hook_resid_pre"},
        {"hook_name": "model.layers.2"},
        {"hf_hook_name": "model.layers.2.output"},
    ],
)  # fmt: skip
def test_the_sae_of_the_place_passes(metadata: dict[str, str], experiment: Composed, tmp_path: Path) -> None:
    assert prepare(experiment(*at(saved(tmp_path / "sae", **metadata))))["saes"]


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"hook_name": "blocks.2.hook_mlp_out"}, "was trained on blocks.2.hook_mlp_out of 'a model without a name'. Choose"),
        ({"hook_name": "blocks.2.hook_resid_pre"}, "Set the layer: adapter.sites.0.layer=1."),
        ({"hook_name": "blocks.3.hook_resid_post"}, "Set the layer: adapter.sites.0.layer=3."),
        ({"hook_name": "blocks.2.hook_resid_post", "hook_head_index": 3}, "blocks.2.hook_resid_post, head 3,"),
        ({"hook_name": "blocks.2.hook_resid_post", "hook_name_out": "blocks.2.hook_mlp_out"}, "written to blocks.2.hook_mlp_out"),
        ({"hook_layer": 3}, "was trained on a hook of layer 3 without a name of"),
        ({"hook_name": ["blocks.2.hook_resid_post"]}, "was trained on ['blocks.2.hook_resid_post'] of"),
        ({"hook_name": "blocks.2.hook_resid_post", "model_name": "gemma-2-2b"}, "of 'gemma-2-2b'"),
        ({"model_name": "gemma-2-2b"}, "a hook without a name of 'gemma-2-2b'"),
    ],
)  # fmt: skip
def test_an_sae_of_another_place_is_refused(
    metadata: dict[str, str], said: str, experiment: Composed, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "sae", **metadata)
    with pytest.raises(ModelError) as error:
        prepare(experiment(*at(folder)))
    for words in (said, "output of decoder layer 2 (blocks.2.hook_resid_post) of 'tiny-llama'", "adapter.force_hook=true"):
        assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert prepare(experiment(*at(folder, 2, "adapter.force_hook=true")))["saes"]


def test_configs_of_older_layouts_are_read(experiment: Composed, tmp_path: Path) -> None:
    """Names on the first level, a layer beside a pattern, and metadata without a version, which sae_lens drops."""
    folder = saved(tmp_path / "sae")
    config = json.loads((folder / "cfg.json").read_text())
    del config["metadata"]
    layouts = (
        {"hook_point": "blocks.1.hook_resid_post"},
        {"hook_name": "blocks.1.hook_mlp_out"},
        {"hook_point": "blocks.{layer}.hook_resid_post", "hook_point_layer": 1},
        {"metadata": {"hook_name": "blocks.1.hook_resid_post"}},
    )
    for layout in layouts:
        (folder / "cfg.json").write_text(json.dumps({**config, **layout}))
        sae_module._load.cache_clear()
        with pytest.raises(ModelError, match=r"trained on blocks\.(1|\{layer\})\.hook"):
            prepare(experiment(*at(folder)))


def test_shipped_and_published_saes_are_of_their_places() -> None:
    demo = next(p.name for p in asset("sae").iterdir() if (p / "cfg.json").is_file())
    site = {"layer": 24, "sae_release": "isaerft-sweep", "sae_id": demo}
    check_hook(load_sae(site), site, "HuggingFaceTB/SmolLM2-135M-Instruct")
    with pytest.raises(ModelError, match="layer=24"):
        check_hook(load_sae(site), {**site, "layer": 23}, "HuggingFaceTB/SmolLM2-135M-Instruct")
    metadata = {"hook_name": "blocks.20.hook_resid_post", "model_name": "gemma-2-2b"}  # as sae_lens's reader of Gemma Scope
    sae = StandardSAE(StandardSAEConfig(d_in=4, d_sae=4, metadata=SAEMetadata(**metadata)))
    published = sae_module.FrozenSae(sae, sae.W_dec.detach(), "")
    reference = {"layer": 20, "sae_release": "gemma-scope-2b-pt-res-canonical", "sae_id": "layer_20/width_16k/canonical"}
    check_hook(published, reference, "google/gemma-2-2b")
    with pytest.raises(ModelError, match="of 'gemma-2-2b'"):
        check_hook(published, reference, "google/gemma-2-9b")


def test_a_release_that_names_hook_and_model_in_its_list(tmp_path: Path) -> None:
    nameless = load_sae({"sae_path": str(saved(tmp_path / "sae"))})
    site = {"layer": 7, "sae_release": "gpt2-small-res-jb", "sae_id": "blocks.8.hook_resid_pre"}
    check_hook(nameless, site, "openai-community/gpt2")
    with pytest.raises(ModelError, match=r"blocks.8.hook_resid_pre of 'gpt2-small'"):
        check_hook(nameless, {**site, "layer": 8}, "openai-community/gpt2")


def test_transcoders_are_refused_whatever_is_insisted_on(experiment: Composed, tmp_path: Path) -> None:
    transcoder = Transcoder(TranscoderConfig(d_in=64, d_sae=96, d_out=64, apply_b_dec_to_input=False))
    transcoder.save_model(str(tmp_path / "sae"))
    with pytest.raises(ModelError, match="is a transcoder, which reads one place and writes another"):
        prepare(experiment(*at(tmp_path / "sae", 2, "adapter.force_hook=true")))


def test_insisting_is_not_part_of_the_question(experiment: Composed, trial: Callable[..., TrialFolder]) -> None:
    """Folders of sweeps that were made without the option open as before, with it too."""
    plain, forced = experiment(*OFF), experiment(*OFF, "adapter.force_hook=true")
    assert identity(plain) == identity(forced)
    folder = trial("tracker=disabled")
    spec = json.loads(folder.spec.read_text())
    del spec["experiment"]["adapter"]["force_hook"]
    folder.spec.write_text(json.dumps(spec))
    assert folder.read_spec().experiment.adapter == replace(plain.adapter, force_hook=False)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def torn(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def changed_config(folder: Path, **more: Any) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def changed_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "sae_weights.safetensors")
    change(tensors)
    save_file(tensors, folder / "sae_weights.safetensors")


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "where there is no cfg.json"),
    "no config": (lambda f: (f / "cfg.json").unlink(), "where there is no cfg.json"),
    "no weights": (lambda f: (f / "sae_weights.safetensors").unlink(), "where there is no sae_weights.safetensors"),
    "pointer": (lambda f: (f / "sae_weights.safetensors").write_bytes(POINTER), "is a pointer of Git LFS"),
    "config pointer": (lambda f: (f / "cfg.json").write_bytes(POINTER), "is a pointer of Git LFS"),
    "torn": (lambda f: torn(f / "sae_weights.safetensors", 0.5), "must be a whole file of safetensors but is not"),
    "empty": (lambda f: torn(f / "sae_weights.safetensors", 0), "must be a whole file of safetensors but is not"),
    "torn header": (lambda f: torn(f / "sae_weights.safetensors", 0.001), "must be a whole file of safetensors but is not"),
    "torn config": (lambda f: torn(f / "cfg.json", 0.5), "must be JSON but cannot be read"),
    "config list": (lambda f: (f / "cfg.json").write_text("[1]"), "must hold an SAE's config"),
    "metadata": (lambda f: changed_config(f, metadata=3), "metadata must be an object but is 3."),
    "no metadata": (lambda f: changed_config(f, metadata=None), "metadata must be an object but is null."),
    "no d_in": (lambda f: changed_config(f, d_in=None), "must say d_in"),
    "text d_sae": (lambda f: changed_config(f, d_sae="96"), "must say d_sae"),
    "architecture": (lambda f: changed_config(f, architecture="jumprely"), "Did you mean 'jumprelu'?"),
    "no word": (lambda f: changed_config(f, architecture=None), "architecture is unknown to sae_lens: None"),
    "other weights": (lambda f: changed_config(f, architecture="jumprelu"), "cannot be read by sae_lens"),
    "no k": (lambda f: changed_config(f, architecture="topk", k=None), "cannot be read by sae_lens|decoder must be affine"),
    "other shape": (lambda f: changed_config(f, d_sae=48), "cannot be read by sae_lens"),
    "normalised": (lambda f: changed_config(f, normalize_activations="layer_norm"), "decoder must be affine"),
    "no such norm": (lambda f: changed_config(f, normalize_activations="maybe"), "cannot be read by sae_lens"),
    "missing tensor": (lambda f: changed_weights(f, lambda t: t.pop("b_enc")), "cannot be read by sae_lens"),
    "nan": (lambda f: changed_weights(f, lambda t: t["b_enc"][3].fill_(torch.nan)), "must hold finite numbers but b_enc has NaN"),
    "infinite": (lambda f: changed_weights(f, lambda t: t["W_dec"][3].fill_(torch.inf)), "must hold finite numbers but W_dec"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(BREAKS))
def test_a_broken_folder_is_one_line(what: str, experiment: Composed, tmp_path: Path) -> None:
    folder = saved(tmp_path / "sae")
    BREAKS[what][0](folder)
    with pytest.raises(ModelError) as error:
        prepare(experiment(*at(folder)))
    assert re.search(BREAKS[what][1], str(error.value)), error.value
    assert len(str(error.value).splitlines()) == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("whole") / "sae", hook_name="blocks.2.hook_resid_post")


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-1, 200), st.text(max_size=4), st.lists(st.integers(), max_size=2))
NAMES = [
    "d_in",
    "d_sae",
    "architecture",
    "normalize_activations",
    "reshape_activations",
    "apply_b_dec_to_input",
    "dtype",
    "metadata",
]


@given(
    st.dictionaries(st.sampled_from([*NAMES, "device", "k", "hook_name"]), VALUES, max_size=2),
    st.sampled_from(["", "cfg.json", "sae_weights.safetensors"]),
    st.one_of(st.none(), st.floats(0, 1)),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_folder_is_read_as_it_is_or_refused_in_one_line(
    whole: Path, config: dict[str, Any], cut: str, share: float | None
) -> None:
    """Changed configs and files cut anywhere: the numbers of the whole one, or an error of one line."""
    expected = load_file(whole / "sae_weights.safetensors")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "sae"
        shutil.copytree(whole, folder)
        changed_config(folder, **config)
        if cut and share is not None:
            torn(folder / cut, share)
        try:
            check_sae_folder(str(folder))
            frozen = load_sae({"sae_path": str(folder)})
        except ModelError as error:
            assert len(str(error).splitlines()) == 1
            return
        for name, tensor in expected.items():
            assert torch.equal(getattr(frozen.sae, name), tensor)
        x = torch.randn(3, 64)
        torch.testing.assert_close(frozen.encode(x), SAE.load_from_disk(folder, dtype="float32").encode(x))
        assert frozen.sae.cfg.architecture() == "standard"
