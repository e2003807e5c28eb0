"""The adapter's numbers against plain forward hooks written from the formulas."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from huggingface_hub import hf_hub_download
from sae_lens import SAE, JumpReLUSAE
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from isaerft_sweep.adapter import IsaerftConfig, load_model
from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.adapter.sae import load_sae
from isaerft_sweep.errors import ConfigError, ModelError
from isaerft_sweep.models import random_model
from isaerft_sweep.specs import ModelSpec

D_IN, D_SAE = random_model.HIDDEN, 96
FAMILIES = ("llama", "gemma2", "gemma3_text", "qwen2", "qwen3", "gpt_neox")
KINDS = ("bias", "scale", "linear", "mlp")
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 2e-5}, torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2}}


def base_model(family: str, cache: Path, dtype: torch.dtype = torch.float32) -> Any:
    folder = random_model.made_folder(ModelSpec(name="tiny", source="random", architecture=family), cache)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def with_adapter(model: Any, sae: str, kind: str = "bias", layers: tuple[int, ...] = (2,), **more: Any) -> peft.PeftModel:
    adapted = peft.get_peft_model(
        model, IsaerftConfig(sites=[{"layer": n, "sae_path": sae} for n in layers], kind=kind, **more)
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert "isaerft_block" in name
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return adapted


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(6, 200, (batch, length), generator=torch.Generator().manual_seed(2))


def plain_hook(sae_path: str, kind: str, block: Any) -> Any:
    """output = x + decode(block(f)) − decode(f), literally, with sae_lens's own encode and decode, in float32."""
    sae = SAE.load_from_disk(sae_path, dtype="float32")
    state = {k: v.detach().float() for k, v in block.state_dict().items()}

    def new_latents(f: torch.Tensor) -> torch.Tensor:
        if kind == "bias":
            return f + state["bias"]
        if kind == "scale":
            return f * (1 + state["scale"])
        if kind == "linear":
            return f + f @ state["weight_0"].T + state["bias_0"]
        hidden = torch.relu(f @ state["weight_0"].T + state["bias_0"])
        return f + hidden @ state["weight_1"].T + state["bias_1"]

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        f = sae.encode(x.float())
        changed = (x.float() + sae.decode(new_latents(f)) - sae.decode(f)).to(x.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sae", ["jumprelu", "topk"])
@torch.no_grad()
def test_the_formula(sae: str, kind: str, dtype: torch.dtype, saes: dict, cache: Path) -> None:
    adapted = with_adapter(base_model("llama", cache, dtype), saes[sae], kind)
    got = adapted(tokens()).logits
    reference = base_model("llama", cache, dtype)
    clean = reference(tokens()).logits
    block = decoder_layers(adapted.get_base_model())[2].isaerft_block["default"]
    decoder_layers(reference)[2].register_forward_hook(plain_hook(saes[sae], kind, block))
    expected = reference(tokens()).logits
    torch.testing.assert_close(got, expected, **TOLERANCE[dtype])
    assert (clean - expected).abs().max() > 0.1, "the adapter must matter for the comparison to mean anything"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bias_is_exactly_x_plus_b_w_dec_in_every_family(family: str, saes: dict, cache: Path) -> None:
    adapted = with_adapter(base_model(family, cache), saes["jumprelu"])
    site = decoder_layers(adapted.get_base_model())[2]
    vector = site.isaerft_block["default"].bias @ SAE.load_from_disk(saes["jumprelu"], dtype="float32").W_dec
    reference = base_model(family, cache)
    decoder_layers(reference)[2].register_forward_hook(
        lambda _m, _i, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector
    )
    assert torch.equal(adapted(tokens()).logits, reference(tokens()).logits)


def test_bias_encodes_nothing(saes: dict, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = with_adapter(base_model("llama", cache), saes["jumprelu"])
    monkeypatch.setattr(JumpReLUSAE, "encode", lambda *_: pytest.fail("the bias adapter must not encode"))
    adapted(tokens())


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_fresh_adapter_changes_nothing(kind: str, rank: int | None, saes: dict, cache: Path) -> None:
    rank = rank if kind in ("linear", "mlp") else None
    model = base_model("llama", cache)
    before = model(tokens()).logits
    config = IsaerftConfig(sites=[{"layer": 1, "sae_path": saes["topk"]}], kind=kind, rank=rank)
    assert torch.equal(peft.get_peft_model(model, config)(tokens()).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_only_the_adapter(kind: str, saes: dict, cache: Path) -> None:
    adapted = with_adapter(base_model("llama", cache), saes["jumprelu"], kind)
    sae = load_sae({"sae_path": saes["jumprelu"]}).sae
    adapted(tokens(), labels=tokens()).loss.backward()
    reached = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert reached and all("isaerft_block" in name for name in reached)
    assert all(p.grad is None for p in sae.parameters())


def test_gradient_of_the_bias_against_finite_differences(saes: dict, cache: Path) -> None:
    adapted = with_adapter(base_model("llama", cache).double(), saes["jumprelu"])
    block = decoder_layers(adapted.get_base_model())[2].isaerft_block["default"]
    loss = adapted(tokens(), labels=tokens()).loss
    loss.backward()
    for i in (0, 17, 95):
        h, values = 1e-3, []
        for sign in (1, -1):
            with torch.no_grad():
                block.bias[i] += sign * h
                values.append(adapted(tokens(), labels=tokens()).loss.item())
                block.bias[i] -= sign * h
        assert block.bias.grad[i].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=2e-2, abs=1e-6)


def test_gradient_checkpointing_leaves_out_the_frozen_layers(saes: dict, cache: Path) -> None:
    model = base_model("llama", cache)
    seen: dict[int, bool] = {}
    for i, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda _m, _i, out, i=i: seen.__setitem__(i, out.requires_grad))
    adapted = with_adapter(model, saes["jumprelu"])
    adapted.train()
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.enable_input_require_grads()  # what every trainer calls
    adapted(tokens(), labels=tokens()).loss.backward()
    assert seen == {0: False, 1: False, 2: False, 3: True}
    assert decoder_layers(adapted.get_base_model())[2].isaerft_block["default"].bias.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_save_and_load(kind: str, saes: dict, cache: Path, tmp_path: Path) -> None:
    adapted = with_adapter(base_model("llama", cache), saes["topk"], kind, layers=(1, 3))
    expected = adapted(tokens()).logits
    adapted.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored and all("isaerft_block" in key for key in stored), "neither the SAE nor the model is saved"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ISAERFT"
    for name in ("default", "another"):
        again = peft.PeftModel.from_pretrained(base_model("llama", cache), tmp_path, adapter_name=name)
        assert torch.equal(again(tokens()).logits, expected), "under any name"
    assert not any("default" in key for key in stored)
    injected = base_model("llama", cache)
    injected.load_adapter(str(tmp_path))  # transformers' own way, which pipelines take
    assert torch.equal(injected(tokens()).logits, expected)


@torch.no_grad()
def test_disable_adapter_and_two_adapters_on_one_model(saes: dict, cache: Path) -> None:
    clean = base_model("llama", cache)(tokens()).logits
    adapted = with_adapter(base_model("llama", cache), saes["jumprelu"])
    first = adapted(tokens()).logits
    with adapted.disable_adapter():
        assert torch.equal(adapted(tokens()).logits, clean)
    adapted.add_adapter("other", IsaerftConfig(sites=[{"layer": 2, "sae_path": saes["topk"]}], kind="scale"))
    adapted.set_adapter("other")
    assert torch.equal(adapted(tokens()).logits, clean), "a fresh adapter changes nothing"
    adapted.set_adapter("default")
    assert torch.equal(adapted(tokens()).logits, first)


@torch.no_grad()
def test_several_sites_add_up(saes: dict, cache: Path) -> None:
    adapted = with_adapter(base_model("llama", cache), saes["jumprelu"], layers=(0, 2))
    w_dec = SAE.load_from_disk(saes["jumprelu"], dtype="float32").W_dec
    reference = base_model("llama", cache)
    for n in (0, 2):
        vector = decoder_layers(adapted.get_base_model())[n].isaerft_block["default"].bias @ w_dec
        decoder_layers(reference)[n].register_forward_hook(lambda _m, _i, out, v=vector: out + v)
    assert torch.equal(adapted(tokens()).logits, reference(tokens()).logits)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@torch.no_grad()
def test_merging_is_exact_and_saves_as_a_plain_model(family: str, saes: dict, cache: Path, tmp_path: Path) -> None:
    adapted = with_adapter(base_model(family, cache), saes["jumprelu"])
    expected = adapted(tokens()).logits
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    adapted.unmerge_adapter()
    torch.testing.assert_close(adapted(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    merged = adapted.merge_and_unload()
    assert not any("isaerft" in name for name, _ in merged.named_modules())
    merged.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(plain(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "kind", "said"),
    [("gemma2", "bias", "'gemma2' has no bias"), ("llama", "scale", "only an adapter of a constant change")],
)
def test_merging_is_refused_where_it_is_not_exact(family: str, kind: str, said: str, saes: dict, cache: Path) -> None:
    with pytest.raises(ModelError, match=said):
        with_adapter(base_model(family, cache), saes["jumprelu"], kind).merge_and_unload()


@torch.no_grad()
def test_merging_looks_at_the_adapters_to_be_merged(saes: dict, cache: Path) -> None:
    adapted = with_adapter(base_model("llama", cache), saes["jumprelu"])
    adapted.add_adapter("other", IsaerftConfig(sites=[{"layer": 2, "sae_path": saes["topk"]}], kind="scale"))
    with pytest.raises(ModelError, match="only an adapter of a constant change"):
        adapted.merge_adapter(["other"])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_moving_the_model_to_another_dtype(kind: str, saes: dict, cache: Path) -> None:
    adapted = with_adapter(base_model("llama", cache), saes["jumprelu"], kind)
    expected = adapted(tokens()).logits
    torch.testing.assert_close(adapted.to(torch.bfloat16)(tokens()).logits.float(), expected, rtol=0.1, atol=0.15)


def test_generation_uses_the_adapter_with_and_without_the_cache(saes: dict, cache: Path) -> None:
    adapted = with_adapter(base_model("llama", cache), saes["jumprelu"])
    out = [adapted.generate(tokens(), max_new_tokens=8, do_sample=False, use_cache=c, pad_token_id=0) for c in (True, False)]
    assert torch.equal(out[0], out[1])
    with adapted.disable_adapter():
        clean = adapted.generate(tokens(), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert not torch.equal(out[0], clean)


def test_wrong_saes_sites_and_configs_are_named(saes: dict, cache: Path, tmp_path: Path) -> None:
    model = base_model("llama", cache)
    wrong = [
        ([{"layer": 9, "sae_path": saes["topk"]}], "between 0 and 3 for this model but got 9"),
        ([{"layer": 1, "sae_release": "isaerft-sweep", "sae_id": "random-32x64"}], "hidden size 64, but .* reads 32"),
        ([{"layer": 1, "sae_release": "isaerft-sweep", "sae_id": "smollm2"}], "has no SAE 'smollm2'"),
        ([{"layer": 1, "sae_path": str(tmp_path)}], "there is no cfg.json"),
        ([{"layer": 1, "sae_release": "no-such-release", "sae_id": "x"}], "must be known to sae_lens"),
        ([{"layer": 1, "sae_release": "gemma-scope-2b-pt-res-canonical", "sae_id": "layer_20/width_16k/canonical"}], "HF_HUB_OFFLINE"),
        ([{"layer": 1, "sae_path": saes["topk"], "fingerprint": "0" * 16}], "the one that the adapter was trained with"),
    ]  # fmt: skip
    for sites, said in wrong:
        with pytest.raises(ModelError, match=said):
            peft.get_peft_model(model, IsaerftConfig(sites=sites))
    with pytest.raises(ConfigError, match="kind must be one of"):
        IsaerftConfig(kind="lora")
    with pytest.raises(ConfigError, match="different layers"):
        IsaerftConfig(sites=[{"layer": 1, "sae_path": "a"}, {"layer": 1, "sae_path": "b"}])
    with pytest.raises(ModelError, match=r"adapter_config.json"):
        load_model(str(tmp_path))


@pytest.mark.slow
@torch.no_grad()
def test_gemma_scope_by_release_and_id_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sae_lens's real loader on a Hub cache laid out by hand: the reference site's file in its real shape, random weights."""
    d_in, d_sae = 2304, 16384
    repository = tmp_path / "models--google--gemma-scope-2b-pt-res"
    folder = repository / "snapshots" / ("0" * 40) / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    random = np.random.default_rng(0)
    w_dec = np.zeros((d_sae, d_in), dtype=np.float32)
    w_dec[:50] = random.standard_normal((50, d_in))
    zeros = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "b_dec": (d_in,), "threshold": (d_sae,)}
    arrays = {name: np.zeros(shape, dtype=np.float32) for name, shape in zeros.items()}
    np.savez_compressed(folder / "params.npz", W_dec=w_dec, **arrays)
    monkeypatch.setattr(
        "sae_lens.loading.pretrained_sae_loaders.hf_hub_download", partial(hf_hub_download, cache_dir=tmp_path)
    )

    sizes = {"hidden_size": d_in, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("gemma2", **sizes, num_key_value_heads=2, head_dim=16, vocab_size=262)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    clean = model(tokens()).logits
    site = {"layer": 0, "sae_release": "gemma-scope-2b-pt-res-canonical", "sae_id": "layer_20/width_16k/canonical"}
    adapted = peft.get_peft_model(model, IsaerftConfig(sites=[site]))
    layer = decoder_layers(adapted.get_base_model())[0]
    layer.isaerft_block["default"].bias[:50] = 1.0
    got = adapted(tokens()).logits
    hook = layer.base_layer.register_forward_hook(lambda _m, _i, out: out + torch.from_numpy(w_dec[:50]).sum(0))
    with adapted.disable_adapter():
        expected = adapted(tokens()).logits
    hook.remove()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - clean).abs().max() > 0.1


LOAD_PICKLED = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[3])
"""


@pytest.mark.parametrize("kind", ["bias", "scale"])
@torch.no_grad()
def test_a_model_can_be_pickled(kind: str, saes: dict, cache: Path, tmp_path: Path) -> None:
    """And read by a process that has imported nothing of ours; the SAE goes as a reference and is checked."""
    adapted = with_adapter(base_model("llama", cache), saes["jumprelu"], kind)
    expected = adapted(tokens()).logits
    torch.save(adapted, tmp_path / "model.pt")
    torch.save(tokens(), tmp_path / "ids.pt")
    names = [str(tmp_path / name) for name in ("model.pt", "ids.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", LOAD_PICKLED, *names], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)
    plain = peft.get_peft_model(base_model("llama", cache), peft.LoraConfig(target_modules=["q_proj"]))
    assert pickle.loads(pickle.dumps(plain)).peft_config["default"].peft_type == peft.PeftType.LORA
    assert copy.deepcopy(adapted)(tokens()).logits.equal(expected)


@torch.no_grad()
def test_weighted_adapters_are_the_weighted_sum_of_what_they_add(saes: dict, cache: Path) -> None:
    adapted = with_adapter(base_model("llama", cache), saes["jumprelu"])
    site = {"layer": 2, "sae_path": saes["jumprelu"]}
    adapted.add_adapter("other", IsaerftConfig(sites=[dict(site)]))
    layer = decoder_layers(adapted.get_base_model())[2]
    layer.isaerft_block["other"].bias.copy_(torch.linspace(-1, 1, 96))
    adapted.add_weighted_adapter(["default", "other"], [0.5, -2.0], "both")
    x = torch.zeros(1, 1, 64)
    expected = 0.5 * layer.change("default", x) - 2 * layer.change("other", x)
    torch.testing.assert_close(layer.change("both", x), expected)
    adapted.set_adapter("both")
    assert not torch.equal(adapted(tokens()).logits, base_model("llama", cache)(tokens()).logits)
    adapted.add_adapter("scaled", IsaerftConfig(sites=[dict(site)], kind="scale"))
    for names, weights, new in (
        (["default", "scaled"], [1, 1], "x"),
        (["default"], [1, 2], "x"),
        (["default"], [1], "both"),
    ):
        with pytest.raises(ConfigError, match=r"must be"):
            adapted.add_weighted_adapter(names, weights, new)
