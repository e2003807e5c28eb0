"""sweep.stop: no further trial once the winner is sure, another promises little, or the device time is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, events
from helpers.sweeps import make_sweep

from isaerft_sweep.config.compose import compose
from isaerft_sweep.controller.static_array import create_static_trials
from isaerft_sweep.controller.stop_rule import StopRule, make_stop_rule
from isaerft_sweep.errors import ConfigError
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.search.distributions import Numeric
from isaerft_sweep.search.sampler import FixedPoints, Sampler
from isaerft_sweep.specs import StopSpec, SweepSpec


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    """Five trials of 10 s each, the last one clearly the best."""
    opened = Journal(make_sweep(tmp_path / "s"))
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (StopSpec(device_hours=0.01), "0.0139 device-hours are spent (sweep.stop.device_hours=0.01)"),
        (StopSpec(device_hours=0.02), ""),
        (StopSpec(probability_best=0.9), "trial 5 is the best with a probability of >99% (sweep.stop.probability_best=0.9)"),
        (StopSpec(expected_gain=0.1), ""),
        (StopSpec(), ""),
    ],
)
def test_the_reason_has_its_numbers(spec: StopSpec, reason: str, journal: Journal) -> None:
    assert make_stop_rule(SweepSpec(stop=spec), journal, FixedPoints([]))() == reason


def test_it_looks_again_only_after_a_trial_has_ended(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, looks = StopRule(SweepSpec(stop=StopSpec(device_hours=9)), journal, FixedPoints([])), []
    monkeypatch.setattr(rule, "_look", lambda: looks.append(1) or "")
    for _ in range(5):
        assert rule() == ""
    assert len(looks) == 1


def test_the_expected_gain_falls_as_the_optimum_is_known() -> None:
    sampler, gains = Sampler({"x": Numeric("uniform", 0, 1)}, "bayes", 0), []
    for _ in range(20):
        point = sampler.ask()
        assert point is not None
        sampler.tell(point, -100 * (point.params["x"] - 0.4) ** 2)
        gain = sampler.expected_gain()
        gains.append(gain and gain.value)
    assert gains[:5] == [None] * 5 and all(gain is not None and gain >= 0 for gain in gains[5:])
    assert (gains[-1] or 0) < 0.05 < (gains[5] or 0), "in units of the metric"


@pytest.mark.slow
def test_a_real_sweep_stops_and_says_why(launch, tmp_path: Path) -> None:
    command = [*TINY, "sweep=reference", "sweep.method=random", "sweep.run_cap=4", "tracker=disabled", "name=s"]
    done = launch(*command, "launcher.slots=1", "sweep.stop.device_hours=0.000001")
    assert done.returncode == 0, done.stderr
    assert (
        "Ended after 1 of 4 trials: " in done.stdout
        and "device-hours are spent (sweep.stop.device_hours=1e-06)" in done.stdout
    )
    again = launch(*command, "launcher.slots=1")
    assert again.returncode == 0, "without the rule the same sweep goes on"
    assert [e["event"] for e in events(tmp_path / "outputs" / "s")].count("trial") == 4


def test_bad_rules(tmp_path: Path) -> None:
    for bad in ("probability_best=0", "probability_best=1.5", "expected_gain=-1", "device_hours=0"):
        with pytest.raises(ConfigError, match=f"sweep.stop.{bad.split('=')[0]} must be"):
            compose([*TINY, f"sweep.stop.{bad}"])
    options = [*TINY, "sweep=reference", "sweep.method=random", "sweep.run_cap=4", f"output={tmp_path}"]
    with pytest.raises(ConfigError, match=r"only without sweep\.stop"):
        create_static_trials(compose([*options, "sweep.stop.device_hours=1"]), options)
