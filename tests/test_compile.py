"""torch.compile on the layers above the site changes no number, and its absence is told before the first trial."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch

from isaerft_sweep.errors import ConfigError
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.specs import Experiment
from isaerft_sweep.trial.prepare import prepare
from isaerft_sweep.trial.runner import run_trial

OFF = ("tracker=disabled", "orpo.learning_rate=0.1")


@pytest.mark.filterwarnings("default")  # torch's compiler uses its own deprecated functions
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a processor; this machine has none")
@pytest.mark.long
def test_a_compiled_trial_has_the_numbers_of_another(trial: Callable[..., TrialFolder]) -> None:
    compiled, plain = trial(*OFF, "launcher.compile=true", name="compiled"), trial(*OFF, name="plain")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert run_trial(compiled, 1) == run_trial(plain, 1) == "completed"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before, "something was compiled"
    for mine, other in zip(compiled.read_metrics(), plain.read_metrics(), strict=True):
        del mine["time"], other["time"]
        assert mine == pytest.approx(other, rel=2e-4, abs=2e-4)


def test_a_missing_compiler_is_told(experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise RuntimeError("no working C++ compiler (a stand-in)")

    monkeypatch.setattr(torch, "compile", missing)
    with pytest.raises(ConfigError, match=r"launcher.compile=true needs a compiler.*no working C\+\+ compiler"):
        prepare(experiment("model=tiny", "launcher.compile=true"))


@pytest.mark.parametrize(
    "other",
    ["launcher.resident=false", "launcher.lean_logits=false", "launcher.compile=true", "orpo.gradient_checkpointing=true"],
)
def test_what_packed_trials_cannot_have(other: str, experiment: Callable[..., Experiment]) -> None:
    for packed in ("2", "null"):
        with pytest.raises(ConfigError, match=f"launcher.trials_per_pass .* must be 1 with {other} but got {packed}"):
            experiment("model=tiny", f"launcher.trials_per_pass={packed}", other)
    assert experiment("model=tiny", "launcher.trials_per_pass=null").launcher.trials_per_pass is None
