"""Columns follow what is swept, and rows can be told apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isaerft_sweep.results.columns import RESERVED_NAMES, columns_for, labels
from isaerft_sweep.search.sweep_file import read_sweep


def shown(key: str, values: list[Any]) -> list[str]:
    points = [{key: value} for value in values]
    (column,) = columns_for(points)
    return [column.show(point) for point in points]


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        ("orpo.learning_rate", [1e-5, 3.568480459462587e-05], ["1.0e-05", "3.6e-05"]),
        ("orpo.learning_rate", [3.61e-05, 3.64e-05], ["3.61e-05", "3.64e-05"]),
        ("orpo.beta", [0.1, 0.15, 2.0], ["0.1", "0.15", "2.0"]),
        ("orpo.beta", [0.1234567, 0.1234568], ["0.1234567", "0.1234568"]),
        ("orpo.weight_decay", [0.0, 1e-05], ["0.0", "1e-05"]),
        ("orpo.max_length", [512, 1024], ["512", "1024"]),
        ("adapter.kind", ["bias", "mlp"], ["bias", "mlp"]),
        ("adapter.top_k", [None, 16], ["null", "16"]),
        ("orpo.gradient_checkpointing", [True, False], ["true", "false"]),
        ("adapter.sites", [[{"layer": 12, "sae_path": "s"}], [{"layer": 20, "sae_path": "s"}]], ["layer 12", "layer 20"]),
        (
            "data.path",
            ["/a/very/long/path/to/pairs-of-one.jsonl", "/a/very/long/path/to/pairs-of-two.jsonl"],
            ["…th/to/pairs-of-one.jsonl", "…th/to/pairs-of-two.jsonl"],
        ),
    ],
)
def test_values(key: str, values: list[Any], words: list[str]) -> None:
    assert shown(key, values) == words


SCALARS = st.none() | st.booleans() | st.integers(-1000, 1000) | st.floats(-1e300, 1e300)
VALUES = SCALARS | st.text("ab/", max_size=40) | st.lists(st.fixed_dictionaries({"layer": st.integers(0, 3)}), max_size=2)


@given(
    st.lists(VALUES, min_size=2, max_size=12, unique_by=repr),
    st.sampled_from(["orpo.learning_rate", "orpo.beta", "adapter.sites"]),
)
def test_different_values_of_one_kind_look_different(values: list[Any], key: str) -> None:
    for kind in (float, str, int):
        alike = [v for v in values if type(v) is kind]
        if len(alike) > 1:
            words = shown(key, alike)
            assert len(set(words)) == len({v + 0.0 if kind is float else v for v in alike}), words
            if kind is float:
                assert all(math.isclose(float(w), v, rel_tol=0.06) for w, v in zip(words, alike, strict=True))


def test_columns_follow_what_is_swept() -> None:
    space = read_sweep(
        {
            "method": "random",
            "metric": {"name": "eval/loss", "goal": "minimize"},
            "parameters": {
                "orpo.warmup_steps": {"values": [5, 10]},
                "orpo.beta": {"min": 0.1, "max": 1.0},
                "adapter.kind": {"value": "bias"},
                "orpo.learning_rate": {"values": [1e-5]},
            },
        }
    ).parameters  # fmt: skip
    point = {"orpo.warmup_steps": 5, "orpo.beta": 0.2, "adapter.kind": "bias", "orpo.learning_rate": 1e-5}
    assert [c.name for c in columns_for([point], space)] == ["beta", "warmup_steps"], "constants are no columns"
    assert [c.name for c in columns_for([], space)] == ["beta", "warmup_steps"]
    seeds = [{**point, "orpo.seed": seed} for seed in (43, 44)]
    assert [c.name for c in columns_for(seeds, space)] == ["beta", "warmup_steps", "seed"], "what others added too"
    assert [c.name for c in columns_for([point])] == ["lr", "beta", "warmup_steps", "kind"], "an agent's point"
    assert columns_for([]) == [] and columns_for([{}]) == []


def test_a_name_says_which_parameter_it_is() -> None:
    assert labels(["data.seed", "orpo.seed"]) == {"data.seed": "data.seed", "orpo.seed": "orpo.seed"}
    assert labels(["adapter.rank", "orpo.beta", "orpo.learning_rate"]) == {
        "orpo.learning_rate": "lr",
        "orpo.beta": "beta",
        "adapter.rank": "adapter.rank",
    }
    assert not set(labels(["orpo.beta", "adapter.kind", "orpo.warmup_steps"]).values()) & set(RESERVED_NAMES)
