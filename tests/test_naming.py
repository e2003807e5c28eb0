from __future__ import annotations

import re
import threading
from datetime import datetime
from pathlib import Path

import pytest
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from isaerft_sweep import naming
from isaerft_sweep.errors import ConfigError

WHEN = datetime(2025, 2, 28, 22, 28)
MODELS = st.one_of(
    st.sampled_from(["google/gemma-2-2b", "HuggingFaceTB/SmolLM2-135M-Instruct", "/data/my models/llama 3", "a" * 120]),
    st.text(min_size=1, max_size=60),
)
RATES = st.floats(min_value=1e-12, max_value=1e3, allow_subnormal=False)
BETAS = st.one_of(st.sampled_from([0.05, 0.1, 0.15, 0.2, 1.0, 5.0]), st.floats(min_value=1e-6, max_value=100))
TIMES = st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2099, 12, 31))


def test_the_published_run_to_the_character() -> None:
    lr, beta = 3.568480459462587e-05, 0.2
    name = naming.run_name("google/gemma-2-2b", lr, beta, WHEN)
    assert name == "run-gemma-2-2b-lr3.6e-05-beta0.2-20250228-2228"
    assert naming.model_name("google/gemma-2-2b", name) == f"GEMMA-2-2B-FT-ORPO-ISAERFT_{name}"
    assert naming.model_name("google/gemma-2-2b", name, "simpo") == f"GEMMA-2-2B-FT-SIMPO-ISAERFT_{name}"
    assert naming.tags(lr, beta, ("smol-course", "module_1")) == (
        "generated_from_trainer",
        "smol-course",
        "module_1",
        "isaerft",
        "lr_3.568480459462587e-05",
        "beta_0.2",
    )


def test_the_later_published_runs_have_no_prefix() -> None:
    name = naming.run_name("google/gemma-2-2b", 1e-6, 0.15, datetime(2025, 3, 1, 3, 59), prefix="")
    assert (
        naming.model_name("google/gemma-2-2b", name)
        == "GEMMA-2-2B-FT-ORPO-ISAERFT_gemma-2-2b-lr1.0e-06-beta0.15-20250301-0359"
    )


@given(MODELS, RATES, BETAS, TIMES, st.integers(0, 3))
def test_names_are_valid_everywhere_and_read_back(model: str, lr: float, beta: float, when: datetime, clashes: int) -> None:
    name = naming.run_name(model, lr, beta, when, suffix=naming.NameSuffix(clashes, "s"))
    repository = naming.model_name(model, name)
    validate_repo_id(repository)
    assert len(repository) <= 96
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", name)
    for text in (name, repository):
        parsed = naming.parse(text)
        assert parsed.learning_rate == float(f"{lr:.1e}")
        assert parsed.beta == pytest.approx(beta, rel=1e-3)
        assert parsed.started == when.replace(second=when.second if clashes else 0, microsecond=0)


@given(st.lists(st.tuples(RATES, BETAS), min_size=2, max_size=12))
def test_reserved_names_differ_even_for_points_that_print_alike(
    tmp_path_factory: pytest.TempPathFactory, points: list
) -> None:
    registry = tmp_path_factory.mktemp("names")
    points = points + points  # the very same point in the same minute, twice
    names = [
        naming.reserve(
            registry,
            lambda clashes, p=point, i=i: naming.run_name("m", *p, WHEN, suffix=naming.NameSuffix(clashes, f"s/{i}")),
        )
        for i, point in enumerate(points)
    ]
    assert len({name.lower() for name in names}) == len(names)


def test_two_sweeps_at_once_never_share_a_name(tmp_path: Path) -> None:
    taken: list[str] = []

    def sweep(salt: str) -> None:
        for i in range(40):
            taken.append(
                naming.reserve(
                    tmp_path,
                    lambda clashes, i=i: naming.run_name(
                        "m", 1e-4, 0.1, WHEN, suffix=naming.NameSuffix(clashes, f"{salt}/{i}")
                    ),
                )
            )

    threads = [threading.Thread(target=sweep, args=(s,)) for s in "ab"]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(set(taken)) == 80


@pytest.mark.parametrize("name", ["", "run-", "gemma-lr1-beta2", "run-gemma-lr3.6e-05-beta0.2", "x_y"])
def test_what_is_no_run_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a run name"):
        naming.parse(name)
