"""Log-probabilities in blocks and chunks against a plain log-softmax, values and gradients."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM, PhiConfig, PhiForCausalLM

from isaerft_sweep.models import random_model
from isaerft_sweep.specs import ModelSpec
from isaerft_sweep.trial.forward import head as module

FAMILIES = [*random_model.ARCHITECTURES, "phi"]
HIDDEN = random_model.HIDDEN
SIZES: dict[str, Any] = {
    "vocab_size": 262,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def models(cache: Path) -> dict[str, Any]:
    """Tiny frozen models, by family."""
    found = {"phi": PhiForCausalLM(PhiConfig(**SIZES)).eval().requires_grad_(False)}
    nn.init.normal_(found["phi"].lm_head.bias)
    for family in random_model.ARCHITECTURES:
        folder = random_model.made_folder(ModelSpec(name="tiny", source="random", architecture=family), cache)
        found[family] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return found


def with_scaled_logits() -> Any:
    """A head that is neither linear nor capped linear: Cohere multiplies its logits by a number."""
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)).eval().requires_grad_(False)


def compare(model: Any, head: module.Head, count: int) -> None:
    """Values and gradients of ``head`` against the model's own forward and a plain log-softmax."""
    vocabulary, random = model.config.vocab_size, torch.Generator().manual_seed(0)
    hidden = (torch.randn(count, HIDDEN, generator=random) * 20).requires_grad_()
    targets, weights = torch.randint(0, vocabulary, (count,), generator=random), torch.randn(count, generator=random)
    targets[:2] = torch.tensor([0, vocabulary - 1])

    logps, means = module.token_logps(hidden, targets, head)
    (logps * weights).sum().backward()
    got, hidden.grad = hidden.grad, None

    logits = model.lm_head(hidden) * getattr(model, "logit_scale", 1.0)
    if cap := getattr(model.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    expected = logits.log_softmax(-1)[torch.arange(count), targets]
    (expected * weights).sum().backward()
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(means, logits.mean(-1))
    torch.testing.assert_close(got, hidden.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(module.token_logps(hidden, targets, head)[0], expected)


@pytest.mark.parametrize("block", [1, 3, 100, 262, 4096])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_over_blocks_of_the_vocabulary(
    family: str, block: int, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 2 soft-caps its logits, Phi's head has a bias."""
    monkeypatch.setattr(module, "CPU_BLOCK", block)
    head = module.model_head(models[family])
    assert isinstance(head, module.LinearHead) and (head.cap is not None) == (family == "gemma2")
    compare(models[family], head, 7)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 100])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_over_chunks_of_the_tokens(
    family: str, chunk_tokens: int, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_scaled_logits() if family == "cohere" else models[family]
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk_tokens * model.config.vocab_size)
    compare(model, module.own_head(model), 7)


def test_every_family_s_head_is_known_for_what_it_is(models: dict[str, Any]) -> None:
    for family, model in models.items():
        assert isinstance(module.model_head(model), module.LinearHead), family
    scaled = with_scaled_logits()
    assert isinstance(module.model_head(scaled), module.AnyHead), "a linear map alone would give other logits"
    compare(scaled, module.model_head(scaled), 7)
    other = with_scaled_logits()
    other.lm_head = type("Quantised", (nn.Linear,), {})(HIDDEN, 262, bias=False)
    assert isinstance(module.model_head(other), module.AnyHead), "its weight may be in another form"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_a_short_dtype_within_its_rounding(dtype: torch.dtype, models: dict[str, Any]) -> None:
    """Against the model's own way in the same dtype, which rounds the logits once."""
    model = copy.deepcopy(models["gemma2"]).to(dtype)
    head = module.model_head(model)
    assert isinstance(head, module.LinearHead)
    hidden, targets = torch.randn(50, HIDDEN).to(dtype), torch.randint(0, 262, (50,))
    outputs = [each.outputs(hidden, targets, True) for each in (head, module.own_head(model))]
    for found, own in zip(*outputs, strict=True):
        assert found is not None and own is not None and found.dtype == own.dtype
        assert float((found - own).float().norm()) < torch.finfo(dtype).eps * float(own.float().norm())


def test_a_model_that_is_gone_leaves_nothing_behind() -> None:
    gc.collect()
    before = len(module._LINEAR)
    for make in (with_scaled_logits, lambda: copy.deepcopy(with_scaled_logits())):
        module.model_head(make())
    gc.collect()
    assert len(module._LINEAR) == before


def test_without_a_gradient_none_is_computed() -> None:
    def head(hidden: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return hidden

    with torch.no_grad():
        logps, _ = module.token_logps(torch.zeros(3, 5), torch.tensor([0, 1, 2]), module.AnyHead(head, 5))
    torch.testing.assert_close(logps, torch.full((3,), -torch.log(torch.tensor(5.0)).item()))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that anything computes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("linear", [False, True])
def test_a_vocabulary_of_256k_does_not_set_the_memory(linear: bool) -> None:
    """Forward and backward: no tensor is larger than a chunk of logits, where all logits would be five times that."""
    vocabulary, positions = 2**18, 640
    weight = torch.randn(vocabulary, 8)
    head: module.Head = module.AnyHead(lambda part: part @ weight.T, vocabulary)
    if linear:
        head = module.LinearHead(nn.Linear(8, vocabulary, bias=False).requires_grad_(False), cap=30.0)
    hidden = torch.randn(positions, 8, requires_grad=True)
    targets = torch.randint(0, vocabulary, (positions,))
    with Largest() as largest:
        logps, _ = module.token_logps(hidden, targets, head)
        logps.sum().backward()
    assert positions * vocabulary == 5 * module.CHUNK_ELEMENTS
    assert largest.elements == (positions * module.CPU_BLOCK if linear else module.CHUNK_ELEMENTS)
    assert hidden.grad is not None and bool(hidden.grad.isfinite().all())
