"""Log-probabilities in chunks against a plain log-softmax, values and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from isaerft_sweep.models import random_model
from isaerft_sweep.specs import ModelSpec
from isaerft_sweep.trial import token_logps as module


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 100])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_values_and_gradients(family: str, chunk_tokens: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 soft-caps its logits, so the head is not linear there."""
    folder = random_model.made_folder(ModelSpec(name="tiny", source="random", architecture=family), cache)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk_tokens * vocabulary)
    torch.manual_seed(0)
    hidden = (torch.randn(7, random_model.HIDDEN) * 20).requires_grad_()
    targets, weights = torch.randint(0, vocabulary, (7,)), torch.randn(7)

    logps, means = module.token_logps(hidden, targets, module.model_head(model), vocabulary)
    (logps * weights).sum().backward()
    got, hidden.grad = hidden.grad, None

    logits = model.lm_head(hidden)
    if cap := getattr(model.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    expected = logits.log_softmax(-1)[torch.arange(7), targets]
    (expected * weights).sum().backward()
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(means, logits.mean(-1))
    torch.testing.assert_close(got, hidden.grad, rtol=1e-4, atol=1e-6)


def test_without_a_gradient_none_is_computed(cache: Path) -> None:
    def head(hidden: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return hidden

    with torch.no_grad():
        logps, _ = module.token_logps(torch.zeros(3, 5), torch.tensor([0, 1, 2]), head, 5)
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


def test_a_vocabulary_of_256k_does_not_set_the_memory() -> None:
    """Forward and backward: no tensor is larger than a chunk of logits, where all logits would be five times that."""
    vocabulary, positions = 2**18, 640
    weight = torch.randn(vocabulary, 8)
    hidden = torch.randn(positions, 8, requires_grad=True)
    targets = torch.randint(0, vocabulary, (positions,))
    with Largest() as largest:
        logps, _ = module.token_logps(hidden, targets, lambda part: part @ weight.T, vocabulary)
        logps.sum().backward()
    assert largest.elements == module.CHUNK_ELEMENTS and positions * vocabulary == 5 * module.CHUNK_ELEMENTS
    assert hidden.grad is not None and bool(hidden.grad.isfinite().all())
