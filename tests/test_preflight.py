"""What was checked a moment ago is not checked again, unless anything that it depends on has changed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY

from isaerft_sweep.controller import preflight
from isaerft_sweep.errors import ModelError
from isaerft_sweep.specs import Experiment

Composed = Callable[..., Experiment]


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Experiment]:
    """The checks that are really made; each finds another number of steps."""
    made: list[Experiment] = []

    def check(experiment: Experiment, *others: Experiment) -> dict[str, int]:
        made.append(experiment)
        if experiment.orpo.max_length == 130:
            raise ModelError("it cannot be had")
        return {"steps": len(made)}

    monkeypatch.setattr(preflight, "check_trial_needs", check)
    monkeypatch.setenv("ISAERFT_CACHE", str(tmp_path / "cache"))
    return made


def kept(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "checked").glob("*.json"))


def test_the_same_is_checked_once(checks: list[Experiment], experiment: Composed, tmp_path: Path) -> None:
    for _ in range(3):
        assert preflight.known_trial_needs(experiment(*TINY)) == {"steps": 1}
    assert preflight.known_trial_needs(experiment(*TINY, "launcher.slots=7", "orpo.max_steps=9")) == {"steps": 1}, (
        "not looked at"
    )
    for change in ("orpo.max_length=200", "adapter=mlp", "data.eval_size=9", "model.dtype=float16", "launcher.compile=true"):
        assert preflight.known_trial_needs(experiment(*TINY, change)) == {"steps": len(checks)}
    assert len(checks) == 6


def test_an_error_is_found_again(checks: list[Experiment], experiment: Composed, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ModelError):
            preflight.known_trial_needs(experiment(*TINY, "orpo.max_length=130"))
    assert len(checks) == 2 and kept(tmp_path) == []


def test_files_and_the_environment_may_change(
    checks: list[Experiment], experiment: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, sae = tmp_path / "pairs.jsonl", tmp_path / "sae"
    data.write_text("{}\n")
    sae.mkdir()
    (sae / "cfg.json").write_text("{}")
    site = f"adapter.sites=[{{layer: 2, sae_path: {sae}}}]"
    composed = experiment(*TINY, "data=jsonl", f"data.path={data}", site)

    def checked() -> int:
        return int(preflight.known_trial_needs(composed)["steps"])

    assert (checked(), checked()) == (1, 1)
    os.utime(data, (1, 1))
    assert (checked(), checked()) == (2, 2)
    (sae / "cfg.json").write_text('{"d_in": 64}')
    assert (checked(), checked()) == (3, 3)
    data.unlink()
    assert (checked(), checked()) == (4, 4)
    monkeypatch.setenv("HF_HOME", "/elsewhere")
    assert (checked(), checked()) == (5, 5)


def test_an_old_a_torn_and_a_lost_check_do_not_count(checks: list[Experiment], experiment: Composed, tmp_path: Path) -> None:
    composed = experiment(*TINY)
    preflight.known_trial_needs(composed)
    path = kept(tmp_path)[0]
    for content in (json.dumps({"time": time.time() - 4000, "facts": {}}), '{"time": 1', "[]", '{"time": "x", "facts": {}}'):
        path.write_text(content)
        assert preflight.known_trial_needs(composed) == {"steps": len(checks)}
    assert len(checks) == 5
    os.utime(path, (1, 1))
    preflight.known_trial_needs(replace(composed, orpo=replace(composed.orpo, max_length=5)))
    assert len(kept(tmp_path)) == 1, "what is too old is removed"


def test_a_cache_that_cannot_be_written_costs_only_the_time(
    checks: list[Experiment], experiment: Composed, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    for number in (1, 2):
        assert preflight.known_trial_needs(experiment(*TINY)) == {"steps": number}
