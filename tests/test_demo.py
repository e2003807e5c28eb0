"""The demo's model, SAE and pairs: real weights, converted, trained and better than before."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.long
def test_the_demo_learns_what_its_pairs_share(launch: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its trials, with the values that won."""
    monkeypatch.setenv("ISAERFT_CACHE", str(tmp_path / "cache"))
    done = launch(
        "model=smollm2-135m", "data=builtin", "adapter=bias", "orpo=quick", "sweep=none", "name=s", "tracker=disabled",
        "orpo.learning_rate=0.26", "orpo.beta=2.0", "orpo.eval_fraction=1.0", "data.eval_size=32", "launcher.threads=1", timeout_s=1400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "variance explained 0." in done.stdout and "L0 " in done.stdout, "the shipped SAE's quality"
    status = json.loads(next((tmp_path / "outputs" / "s").glob("trials/*/status.json")).read_text())
    for name in ("eval/log_odds_chosen", "eval/rewards/accuracies"):
        assert status["metrics"][name] > status["untrained"][name], (name, status)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20, "KiB: under 4 GiB in any process"
