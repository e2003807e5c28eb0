"""The frozen layers' stored output: shared, verified, bounded, and never the reason why a trial fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.sweeps import serve
from helpers.trials import OFF, Made, rows_of

from isaerft_sweep.journal.worker_queue import Task, WorkerFolder
from isaerft_sweep.trial.forward.activation_cache import NotStored, _make_room
from isaerft_sweep.trial.forward.upper_layers import UpperLayers
from isaerft_sweep.trial.runner import run_trial
from isaerft_sweep.trial.worker import serve_trials

LEAVE_HALF = """
import sys, time, pathlib
from isaerft_sweep.journal.atomic_files import create_once

def make(aside):
    (aside / "values.npy").write_bytes(b"x" * 1000)
    print("half", flush=True)
    time.sleep(600)

create_once(pathlib.Path(sys.argv[1]), make)
"""


def test_the_cache_is_shared_verified_and_bounded(trial: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scratch = tmp_path / "scratch"
    options = (*OFF, f"launcher.scratch={scratch}")
    first, second = trial(*options, name="a"), trial(*options, "orpo.beta=0.5", "orpo.learning_rate=1e-3", name="b")
    assert run_trial(first, 1) == run_trial(second, 1) == "completed"
    entries = [p for p in scratch.iterdir() if p.is_dir()]
    assert len(entries) == 1, "same model and data: one entry for both trials"
    values = entries[0] / "values.npy"
    content = bytearray(values.read_bytes())
    content[-1] ^= 255
    values.write_bytes(content)
    third = trial(*options, name="c")
    capsys.readouterr()
    assert run_trial(third, 1) == "completed"
    assert "are damaged and are computed again" in capsys.readouterr().out and rows_of(third) == rows_of(first)
    tiny = trial(*OFF, f"launcher.scratch={tmp_path / 'none'}", "launcher.activation_cache_gb=0.000001", name="d")
    capsys.readouterr()
    assert run_trial(tiny, 1) == "completed"
    assert "would not fit launcher.activation_cache_gb" in capsys.readouterr().out


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a disk of its own cannot be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("what", ["full", "unwritable"])
def test_a_disk_that_takes_nothing_costs_only_the_time(
    what: str, trial: Made, tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = trial(*OFF, "launcher.activation_cache_gb=0", name="without")
    assert run_trial(without, 1) == "completed"
    (tmp_path / "file").touch()
    scratch = small_disk / "cache" if what == "full" else tmp_path / "file" / "cache"
    capsys.readouterr()
    folder = trial(*OFF, f"launcher.scratch={scratch}")
    assert run_trial(folder, 1) == "completed", folder.read_status()
    said = capsys.readouterr().out
    assert f"computed in every step: {scratch} cannot be written (" in said
    assert ("GB are free" if what == "full" else "Not a directory") in said
    assert rows_of(folder) == rows_of(without)


def test_what_a_killed_maker_left_goes_and_what_is_being_made_counts(tmp_path: Path) -> None:
    makers = []
    for name in ("killed", "alive"):
        command = [sys.executable, "-c", LEAVE_HALF, str(tmp_path / name)]
        maker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert maker.stdout is not None and maker.stdout.readline() == "half\n"
        makers.append(maker)
    try:
        makers[0].kill()
        makers[0].wait()
        (tmp_path / "whole").mkdir()
        (tmp_path / "whole" / "values.npy").write_bytes(b"x" * 1000)
        assert len(list(tmp_path.glob(".*/values.npy"))) == 2
        _make_room(tmp_path, 2500)
        assert [p.parent.name.split(".")[1] for p in tmp_path.glob(".*/values.npy")] == ["alive"]
        assert (tmp_path / "whole").is_dir()
        _make_room(tmp_path, 1500)
        assert not (tmp_path / "whole").exists(), "the least recently used makes room"
        with pytest.raises(NotStored, match="other workers"):
            _make_room(tmp_path, 500)
    finally:
        for maker in makers:
            maker.kill()
            maker.communicate()


@pytest.mark.slow
def test_of_many_pairs_and_few_steps_only_what_is_reached_is_stored(
    trial: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[UpperLayers] = []
    hidden = UpperLayers.hidden
    monkeypatch.setattr(UpperLayers, "hidden", lambda self, *a: (self in seen or seen.append(self), hidden(self, *a))[1])
    options = (*OFF, "orpo.max_steps=3", "orpo.batch_size=2", "orpo.gradient_accumulation=1", "orpo.learning_rate=0.1")
    stored = (*options, f"launcher.scratch={tmp_path / 'scratch'}")
    trials = [trial(*stored, "orpo.seed=1", name="first"), trial(*stored, "orpo.seed=2", name="other")]
    whole = [trial(*options, "launcher.activation_cache_gb=0", f"orpo.seed={i + 1}", name=f"whole{i}") for i in range(2)]
    assert serve(WorkerFolder(tmp_path / "worker"), trials) == 2
    seen = [above for above in seen if isinstance(above.stored.values, np.memmap)]  # not the check's few tokens in memory
    bound = 2 * (6 + 8 + 8) + 24
    assert len(seen[0].stored.places) <= bound, (
        "answers of 6 pairs for training, 8 for evaluations, 8 for the test, and the neutral texts"
    )
    assert seen[0].computed == 0 and seen[1].computed > 0 and seen[1].stored is seen[0].stored
    for mine, other in zip(trials, whole, strict=True):
        assert run_trial(other, 1) == "completed"
        for row, expected in zip(rows_of(mine), rows_of(other), strict=True):
            shared = {key: row[key] for key in expected if "logits" not in key}
            assert shared == pytest.approx({key: expected[key] for key in shared}, rel=1e-4, abs=1e-5)


SAE = "sae_release: isaerft-sweep, sae_id: random-64x256"


@pytest.mark.parametrize("together", [False, True])
def test_several_hook_points_are_reused_from_the_lowest_on(together: bool, trial: Made, tmp_path: Path) -> None:
    options = (*OFF, f"adapter.sites=[{{layer: 2, {SAE}}}, {{layer: 1, {SAE}}}]", "orpo.learning_rate=0.1")
    whole = [trial(*options, "launcher.activation_cache_gb=0", f"orpo.beta={b}", name=f"whole{b}") for b in (0.1, 0.5)]
    reused = [trial(*options, f"launcher.scratch={tmp_path}/s", f"orpo.beta={b}", name=f"reused{b}") for b in (0.1, 0.5)]
    assert [run_trial(one, 1) for one in whole] == ["completed"] * 2
    if together:
        folder = WorkerFolder(tmp_path / "worker")
        for one in reused:
            folder.claim(Task(str(one.path), 1), room=None)
        folder.claim(Task(None), room=None)
        assert serve_trials(folder, trials_per_pass=2) == 2
    else:
        assert [run_trial(one, 1) for one in reused] == ["completed"] * 2
    for mine, other in zip(reused, whole, strict=True):
        assert len(rows_of(mine)) == len(rows_of(other)) == 6
        for row, expected in zip(rows_of(mine), rows_of(other), strict=True):
            shared = {key: row[key] for key in expected if "logits" not in key}
            assert shared == pytest.approx({key: expected[key] for key in shared}, rel=1e-4, abs=1e-5)
        entry = next(path for path in (tmp_path / "s").iterdir() if path.is_dir())
        assert len(list(entry.glob("values.npy"))) == 1
