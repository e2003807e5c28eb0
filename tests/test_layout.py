"""Pairs behind a shared prompt: every token in its place, and the states and gradients of rows of their own."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from isaerft_sweep.models import random_model
from isaerft_sweep.specs import ModelSpec
from isaerft_sweep.trial.forward.batch_layout import Batch, one_row_per_sequence, shared_prefix_rows, unique_read_positions
from isaerft_sweep.trial.forward.strategy import read_states, why_not_shared

FAMILIES = ["llama", "gemma2", "gemma3_text", "qwen2", "qwen3", "gpt_neox"]
TOKENS = st.lists(st.integers(6, 9), max_size=12)


def batch_of(pairs: list[tuple[list[int], list[int]]]) -> Batch:
    """As TRL joins a batch: the chosen ones above, the rejected ones below."""
    sequences = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    return Batch(ids, mask, mask[:, 1:].bool(), tuple((i, i + len(pairs)) for i in range(len(pairs))))


@given(st.lists(st.tuples(st.lists(st.integers(6, 9), min_size=1, max_size=5), TOKENS, TOKENS), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_every_token_sees_what_is_before_it_and_nothing_else(
    given_pairs: list[tuple[list[int], list[int], list[int]]],
) -> None:
    pairs = [(prompt + a, prompt + b) for prompt, a, b in given_pairs]
    batch = batch_of(pairs)
    layout = shared_prefix_rows(batch)
    rows, width = list(range(len(pairs))), layout.ids.shape[1]
    found = layout.inputs(rows, width, type("Plain", (), {}), torch.float32)
    seen = found["attention_mask"][:, 0] == 0
    for number, sequence in enumerate([*(c for c, _ in pairs), *(r for _, r in pairs)]):
        row, columns = int(layout.row[number, 0]), layout.column[number, : len(sequence)]
        assert layout.ids[row, columns].tolist() == sequence
        assert found["position_ids"][row, columns].tolist() == list(range(len(sequence)))
        for at, column in enumerate(columns):
            assert seen[row, column].nonzero()[:, 0].tolist() == sorted(columns[: at + 1].tolist())
    shared = sum(
        next((i for i, (a, b) in enumerate(zip(c, r, strict=False)) if a != b), min(len(c), len(r))) for c, r in pairs
    )
    assert sum(layout.lengths) == sum(len(c) + len(r) for c, r in pairs) - shared
    values = torch.rand(*batch.ids.shape, 3)
    arranged = layout.arranged(values, batch.mask)
    number = len(pairs)  # of a rejected one: what it shares comes from either side, as both sides hold the same
    tail = [at for at in range(len(pairs[0][1])) if layout.branch[layout.row[number, at], layout.column[number, at]] == 2]
    assert torch.equal(arranged[layout.row[number, tail], layout.column[number, tail]], values[number, tail])


@given(
    st.lists(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.integers(6, 9), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None)
def test_a_beginning_that_a_trial_s_sequences_share_is_read_once(
    trials: list[list[tuple[list[int], list[int]]]], beginning: list[int], random: random.Random
) -> None:
    """Nothing is taken from another trial, and only what has the same tokens before it and the same next token."""
    # as co-batched trials are joined: each one's chosen, then its rejected ones
    sequences: list[list[int]] = []
    starts = []
    for trial in trials:
        starts.append(len(sequences))
        sequences += [beginning + a for a, _ in trial] + [beginning + b for _, b in trial]
    owner = [n for n, trial in enumerate(trials) for _ in range(2 * len(trial))]
    width = max(map(len, sequences)) + 1
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    read = mask[:, 1:].bool() & torch.tensor([[random.random() < 0.8 for _ in range(width - 1)] for _ in sequences])
    wanted, places = unique_read_positions(Batch(ids, mask, read, (), tuple(starts)))
    looked_at = [(owner[s], tuple(sequences[s][: j + 2])) for s, j in read.nonzero().tolist()]
    assert len(places) == len(looked_at) and sorted(set(places.tolist())) == list(range(len(wanted)))
    assert [looked_at[i] for i in wanted[places].tolist()] == looked_at
    for number, start in enumerate(starts):
        shared = [j for j in range(len(beginning) - 1) if read[start, j]]
        for j in shared:
            once = {
                p
                for p, (s, at) in zip(places.tolist(), read.nonzero().tolist(), strict=True)
                if owner[s] == number and at == j
            }
            assert len(once) == 1


@pytest.mark.parametrize(
    ("family", "attention"),
    [(f, a) for f in FAMILIES for a in ("sdpa", "eager") if (f, a) != ("gemma2", "sdpa")],  # transformers has none
)
def test_states_and_gradients_are_those_of_rows_of_their_own(family: str, attention: str, cache: Path) -> None:
    folder = random_model.made_folder(ModelSpec(name="tiny", source="random", architecture=family), cache)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    if getattr(model.config, "layer_types", None) and "sliding_attention" in model.config.layer_types:
        model.config.sliding_window = 8
        for layer in model.model.layers:
            if layer.self_attn.sliding_window is not None:
                layer.self_attn.sliding_window = 8
    assert why_not_shared(model) is None
    random = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(6, 200, (count,), generator=random).tolist()

    prompts = [tokens(n) for n in (20, 3, 1, 11)]
    batch = batch_of([(p + tokens(a), p + tokens(b)) for p, a, b in zip(prompts, (9, 30, 4, 1), (25, 2, 5, 1), strict=True)])
    weight = next(getattr(model, model.base_model_prefix).parameters())
    direction = torch.randn(int(batch.read.sum()), 64, generator=random)

    def run(layout: object) -> tuple[torch.Tensor, torch.Tensor]:
        weight.grad = None
        found = read_states(model, batch, layout)  # type: ignore[arg-type]
        (found * direction).sum().backward()
        return found.detach(), weight.grad.clone()

    apart, together = run(one_row_per_sequence(batch)), run(shared_prefix_rows(batch))
    torch.testing.assert_close(together[0], apart[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], apart[1], rtol=1e-3, atol=1e-5 * apart[1].abs().max().item())
    assert apart[1].abs().max() > 0.1


def test_a_model_that_cannot_is_told_why(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_model.made_folder(ModelSpec(name="tiny", source="random", architecture="llama"), cache)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.sliding_window = 8
    assert "sliding window" in str(why_not_shared(model))
    model.config.sliding_window = None
    # a model that overlooks the positions it is given
    forward = type(model.model).forward
    monkeypatch.setattr(type(model.model), "forward", lambda self, position_ids=None, **k: forward(self, **k))
    assert "would change by" in str(why_not_shared(model))
    monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")
    assert "flash_attention_2" in str(why_not_shared(model))
