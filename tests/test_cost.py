"""Device time: what trials have shared is counted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st

from isaerft_sweep.journal.journal import Journal, SweepRecord
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.readiness.calibrate import from_earlier_sweeps
from isaerft_sweep.readiness.plan import gpu_count, time_text
from isaerft_sweep.results.cost import device_seconds
from isaerft_sweep.spec_fields import to_dict

SPANS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 20), st.integers(1, 9)), max_size=8)


def replayed(spans: list[tuple[str, float, float]]) -> SweepRecord:
    """A journal of trials that ran on a worker from a moment, for some seconds."""
    record = SweepRecord()
    for i, (worker, start, seconds) in enumerate(spans):
        job = {"kind": "resident", "worker": worker, "task": i, "job": {"kind": "local", "pid": 1}}
        end = {"state": "completed", "metric": 1.0, "message": "", "given_up": False}
        record.apply({"event": "trial", "index": i, "name": f"t{i}", "run_id": f"r{i}", "params": {}, "unit": {}})
        record.apply({"event": "dispatch", "index": i, "attempt": 1, "job": job})
        record.apply({"event": "end", "index": i, "time": start + seconds, "seconds": seconds, **end})
    return record


@given(SPANS)
def test_shares_add_up_to_the_time_in_which_a_worker_ran_anything(spans: list[tuple[str, int, int]]) -> None:
    shares = device_seconds(replayed(spans).trials.values())
    busy = {(worker, second) for worker, start, seconds in spans for second in range(start, start + seconds)}
    assert sum(shares.values()) == pytest.approx(len(busy))
    for i, (worker, start, seconds) in enumerate(spans):
        others = [sum(w == worker and a <= s < a + n for w, a, n in spans) for s in range(start, start + seconds)]
        assert shares[i] == pytest.approx(sum(1 / n for n in others))


def test_co_batched_trials_and_devices_with_several_workers() -> None:
    shared = replayed([("a", 0, 10), ("a", 0, 10), ("a", 5, 10), ("b", 0, 10)])
    assert device_seconds(shared.trials.values()) == pytest.approx({0: 2.5 + 5 / 3, 1: 2.5 + 5 / 3, 2: 5 / 3 + 5, 3: 10})
    assert sum(device_seconds(shared.trials.values(), per_device=2).values()) == pytest.approx(12.5)


def test_a_plan_learns_from_earlier_sweeps(experiment: Any, tmp_path: Path) -> None:
    composed = experiment(*TINY, f"output={tmp_path}", "sweep=quick")
    assert from_earlier_sweeps(composed, ["orpo.learning_rate"]) is None
    folder = SweepFolder(tmp_path / "earlier")
    journal = Journal(folder)
    for i in range(3):
        job = {"kind": "resident", "worker": "w", "task": i, "job": {"kind": "local", "pid": 1}}
        journal.write("trial", index=i, name=f"t{i}", run_id=f"r{i}", params={}, unit={})
        journal.write("dispatch", index=i, attempt=1, job=job)
    for i in range(3):
        journal.write("end", index=i, state="completed", metric=1.0, message="", seconds=60.0, given_up=False)
    journal.close()
    folder.config.write_text(yaml.safe_dump(to_dict(composed)))
    found = from_earlier_sweeps(composed, ["orpo.learning_rate"])
    assert found is not None and found.seconds == 60 and found.device_s == pytest.approx(20, rel=0.01), "three went together"
    assert "median of 3 trials of earlier" in found.source
    assert from_earlier_sweeps(experiment(*TINY, f"output={tmp_path}", "sweep=quick", "orpo.max_steps=9"), []) is None
    words = time_text(found, 30, 3, 2)
    assert "0.333 GPU-hours together, about 10 min with 3 at a time" in words, words


@pytest.mark.parametrize(
    ("asked", "gpus"),
    [
        ({"gpus_per_node": "a100:2"}, 2),
        ({"gres": "gpu:a100:2,disk:10"}, 2),
        ({"gres": "disk:10"}, 0),
        ({"additional_parameters": {"gpus": 2}}, 2),
        ({}, 0),
    ],
)
def test_gpus_of_a_job(asked: dict[str, Any], gpus: int) -> None:
    assert gpu_count(asked) == gpus
