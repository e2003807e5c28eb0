"""Groups of near length: every sequence once, at the least cost; and the numbers stay."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from isaerft_sweep.models import random_model
from isaerft_sweep.specs import ModelSpec
from isaerft_sweep.trial.forward.batch_layout import Batch, one_row_per_sequence
from isaerft_sweep.trial.forward.strategy import CALL_FLOPS, read_states
from isaerft_sweep.trial.length_groups import length_groups


def cost(groups: list[list[int]], lengths: list[int], call: int) -> int:
    return sum(max(lengths[i] for i in group) * len(group) + call for group in groups)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=7), st.integers(0, 300), st.sampled_from([1, 150, 400, math.inf]))
@settings(max_examples=100, deadline=None)
def test_no_other_division_costs_less(lengths: list[int], call: int, most: float) -> None:
    def allowed(groups: Iterable[list[int]]) -> bool:
        return all(len(group) == 1 or max(lengths[i] for i in group) * len(group) <= most for group in groups)

    groups = length_groups(lengths, call, most)
    assert allowed(groups)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for labels in itertools.product(range(len(lengths)), repeat=min(len(lengths), 5)):
        if len(lengths) > 5:
            break
        other: dict[int, list[int]] = {}
        for i, label in enumerate(labels):
            other.setdefault(label, []).append(i)
        if allowed(other.values()):
            assert cost(groups, lengths, call) <= cost(list(other.values()), lengths, call)


def test_dear_calls_make_one_group_and_free_ones_many() -> None:
    assert length_groups([10, 200, 11, 198], 10_000) == [[0, 1, 2, 3]]
    assert length_groups([10, 200, 11, 198], 0) == [[1], [3], [2], [0]]
    assert length_groups([10, 200, 11, 198], 16) == [[1, 3], [0, 2]]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen2", "qwen3", "gpt_neox"])
def test_the_states_and_gradients_are_those_of_the_padded_batch(family: str, cache, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_model.made_folder(ModelSpec(name="tiny", source="random", architecture=family), cache)
    model = AutoModelForCausalLM.from_pretrained(folder)
    decoder = getattr(model, model.base_model_prefix)
    lengths = torch.tensor([40, 7, 90, 8, 88, 41])
    mask = (torch.arange(90)[None] < lengths[:, None]).long()
    ids = torch.randint(6, 200, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    read = mask[:, 1:].bool() & (torch.arange(89)[None] > 2)
    weight = next(decoder.parameters())
    direction = torch.randn(int(read.sum()), 64, generator=torch.Generator().manual_seed(1))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        weight.grad = None
        batch = Batch(ids, mask, read, ())
        found = read_states(model, batch, one_row_per_sequence(batch))
        (found * direction).sum().backward()
        return found.detach(), weight.grad.clone()

    monkeypatch.setitem(CALL_FLOPS, "cpu", 1e15)
    whole = run()
    expected = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1][read]
    assert torch.equal(whole[0], expected)
    monkeypatch.setitem(CALL_FLOPS, "cpu", 1e6)
    grouped = run()
    torch.testing.assert_close(grouped[0], whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grouped[1], whole[1], rtol=1e-4, atol=1e-5 * whole[1].abs().max().item())
    assert whole[1].abs().max() > 0.1
