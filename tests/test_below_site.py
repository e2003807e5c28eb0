"""The frozen layers up to the site: every sequence's stream, whatever row it ran in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from isaerft_sweep.models import random_model
from isaerft_sweep.specs import ModelSpec
from isaerft_sweep.trial.forward import frozen_prefix
from isaerft_sweep.trial.forward.frozen_prefix import in_pairs, streams_of

SEQUENCES = st.lists(st.lists(st.integers(6, 8), min_size=1, max_size=6), unique_by=tuple, max_size=12)


def check_same_format(a: list[int], b: list[int]) -> int:
    return len(os.path.commonprefix(["".join(map(chr, a)), "".join(map(chr, b))]))  # noqa: RUF071 (letter by letter is meant)


@given(SEQUENCES)
@settings(max_examples=300, deadline=None)
def test_every_sequence_is_in_one_pair(sequences: list[list[int]]) -> None:
    pairs = in_pairs(sequences)
    assert sorted(n for pair in pairs for n in set(pair)) == list(range(len(sequences)))
    assert all(a == b or check_same_format(sequences[a], sequences[b]) > 0 for a, b in pairs), "nothing in common is no pair"


def test_the_answers_to_a_prompt_come_together() -> None:
    """Also when a single answer lies between them in order, and all prompts begin with the same system prompt."""
    system = [1, 2, 3]
    prompts = {name: [*system, *tokens] for name, tokens in {"a": [10, 11], "b": [12], "c": [13, 14, 15]}.items()}
    sequences = [
        [*prompts[name], *tail] for name, tail in (("c", [9]), ("a", [7]), ("b", [5, 6]), ("a", [8, 8]), ("c", [4]))
    ]
    assert {frozenset(pair) for pair in in_pairs(sequences)} == {frozenset({1, 3}), frozenset({0, 4}), frozenset({2})}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("family", list(random_model.ARCHITECTURES))
def test_streams_are_those_of_sequences_alone(
    family: str, share: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(frozen_prefix.CALL_TOKENS, "cpu", 64)
    folder = random_model.made_folder(ModelSpec(name="tiny", source="random", architecture=family), cache)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager" if family == "gemma2" else "sdpa")
    layers = getattr(model, model.base_model_prefix).layers
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(6, 200, (count,), generator=generator).tolist()

    system = tokens(5)
    sequences = [
        [*prompt, *tokens(n)] for prompt in ([*system, *tokens(9)], [*system, *tokens(3)], system) for n in (4, 20, 1)
    ]
    ran: list[int] = []
    layers[0].register_forward_pre_hook(lambda _module, args: ran.append(args[0].shape[0] * args[0].shape[1]))
    found = dict(streams_of(model, layers[2], sequences, share))
    computed = sum(ran)
    assert sorted(found) == list(range(len(sequences)))
    for number, sequence in enumerate(sequences):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([sequence]), output_hidden_states=True).hidden_states[3]
        torch.testing.assert_close(found[number], states[0], rtol=1e-4, atol=1e-5)
    assert not share or computed < sum(map(len, sequences)), "what two have in common is computed once"
