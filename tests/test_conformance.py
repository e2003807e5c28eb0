"""The same scenarios wherever trials run: what the controller relies on holds for processes here and for SLURM jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from conftest import TINY, events
from helpers.sweeps import ended_states
from helpers.waiting import wait_for

from isaerft_sweep.dispatch.base import Dispatcher
from isaerft_sweep.dispatch.job import prepare_process
from isaerft_sweep.dispatch.local import LocalDispatcher
from isaerft_sweep.dispatch.slurm.dispatcher import SlurmDispatcher
from isaerft_sweep.journal.job_refs import job_from_json
from isaerft_sweep.journal.worker_queue import STOP_AT
from isaerft_sweep.specs import LauncherSpec

pytestmark = pytest.mark.slow
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # jobs cannot import tests
Make = Callable[..., Dispatcher]


@dataclass(frozen=True)
class Waiter:
    """A job that says where it is and waits: for a file ``go``, or for a request to end."""

    folder: str
    number: int
    threads: int | None
    device: str | None = None
    limit_s: float | None = None
    child: bool = False

    def __call__(self) -> str:
        prepare_process(self.threads, self.device, self.limit_s)
        folder = Path(self.folder)
        pids = [os.getpid(), *([subprocess.Popen(["sleep", "600"]).pid] if self.child else [])]
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SLURMD_NODENAME", STOP_AT)
        facts = {"pids": pids, **{name: os.environ.get(name) for name in names}}
        print(f"waiter {self.number} is here", flush=True)
        (folder / "aside").mkdir(exist_ok=True)
        (folder / "aside" / str(self.number)).write_text(json.dumps(facts))
        (folder / "aside" / str(self.number)).rename(folder / f"here{self.number}")
        while not (folder / "go").exists() and not asked:
            time.sleep(0.02)
        (folder / f"left{self.number}").write_text("asked" if asked else "went")
        return "done"


@pytest.fixture(params=["local", "slurm"])
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes dispatchers of one kind, all for the same sweep's folder."""
    folder = tmp_path / "sweep" / "jobs"
    if request.param == "slurm":
        request.getfixturevalue("slurm")
        yield lambda **options: SlurmDispatcher(LauncherSpec(kind="slurm", slots=4, **options), folder)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        yield lambda **options: LocalDispatcher(LauncherSpec(**{"slots": 4, **options}), folder)
    (tmp_path / "go").touch()


def submit(dispatcher: Dispatcher, folder: Path, count: int, child: bool = False) -> tuple[list[Any], list[dict[str, Any]]]:
    jobs: Any = [Waiter(str(folder), i, dispatcher.threads, child=child) for i in range(count)]
    refs = dispatcher.submit_all(jobs)
    wait_for(lambda: len(list(folder.glob("here*"))) == count)
    return refs, [json.loads((folder / f"here{i}").read_text()) for i in range(count)]


def until_gone(dispatcher: Dispatcher, refs: list[Any]) -> None:
    wait_for(lambda: not any(dispatcher.alive(refs)))


def living(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kept(refs: list[Any]) -> list[Any]:
    """The references as another process reads them from a journal."""
    return [job_from_json(json.loads(json.dumps(ref.to_json()))) for ref in refs]


def test_jobs_run_beside_each_other_and_are_seen_to_end(make: Make, tmp_path: Path) -> None:
    dispatcher = make()
    refs, _ = submit(dispatcher, tmp_path, 3)
    assert dispatcher.alive(refs) == [True] * 3
    (tmp_path / "go").touch()
    until_gone(dispatcher, refs)
    assert [(tmp_path / f"left{i}").read_text() for i in range(3)] == ["went"] * 3
    assert all(f"waiter {i} is here" in dispatcher.log_tail(ref) for i, ref in enumerate(refs))
    assert [dispatcher.job_exit(ref).cause for ref in refs] == ["trial"] * 3
    dispatcher.cancel(refs)
    dispatcher.kill(refs)  # nothing, for they have ended
    assert kept(refs) == refs, "the journal can keep them"


def test_each_job_has_a_gpu_of_its_own_and_its_share_of_cores(make: Make, tmp_path: Path) -> None:
    dispatcher = make()
    refs, facts = submit(dispatcher, tmp_path, 2)
    assert len({(fact["SLURMD_NODENAME"], fact["CUDA_VISIBLE_DEVICES"]) for fact in facts}) == 2
    assert all(fact["CUDA_VISIBLE_DEVICES"] in ("0", "1") for fact in facts)
    (tmp_path / "go").touch()
    until_gone(dispatcher, refs)


def test_several_trials_share_a_gpu_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    dispatcher = LocalDispatcher(LauncherSpec(trials_per_gpu=2), tmp_path / "jobs")
    assert dispatcher.slots == 4
    refs, facts = submit(dispatcher, tmp_path, 4)
    assert sorted(fact["CUDA_VISIBLE_DEVICES"] for fact in facts) == ["0", "0", "1", "1"]
    (tmp_path / "go").touch()
    until_gone(dispatcher, refs)


def test_cancel_asks_and_kill_does_not(make: Make, tmp_path: Path) -> None:
    dispatcher = make()
    refs, facts = submit(dispatcher, tmp_path, 2, child=True)
    dispatcher.alive(refs)
    dispatcher.kill(refs[:1])
    until_gone(dispatcher, refs[:1])
    if isinstance(dispatcher, LocalDispatcher):  # SLURM sends SIGTERM before it kills, which the job may still note
        assert not (tmp_path / "left0").exists(), "it was not asked"
    assert dispatcher.alive(refs) == [False, True]
    dispatcher.cancel(refs[1:])
    until_gone(dispatcher, refs)
    assert (tmp_path / "left1").read_text() == "asked"
    wait_for(lambda: not any(living(pid) for pid in facts[0]["pids"]))


def test_another_dispatcher_finds_the_jobs_again(make: Make, tmp_path: Path) -> None:
    refs, _ = submit(make(), tmp_path, 2)
    found = kept(refs)
    other = make()
    assert other.alive(found) == [True, True]
    other.cancel(found)
    until_gone(other, found)
    assert {(tmp_path / f"left{i}").read_text() for i in range(2)} == {"asked"}
    assert "waiter 1 is here" in other.log_tail(found[1])


def test_a_job_that_is_killed_is_seen_to_be_gone(make: Make, tmp_path: Path) -> None:
    dispatcher = make()
    refs, facts = submit(dispatcher, tmp_path, 2)
    os.kill(facts[0]["pids"][0], signal.SIGKILL)
    until_gone(dispatcher, refs[:1])
    assert dispatcher.alive(refs) == [False, True] and dispatcher.job_exit(refs[0]).cause == "trial"
    (tmp_path / "go").touch()
    until_gone(dispatcher, refs)


@pytest.mark.parametrize("kind", ["local", "slurm"])
@pytest.mark.long
def test_a_sweep_with_bounded_workers(kind: str, launch: Callable, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if kind == "slurm":
        request.getfixturevalue("slurm")
    bounded = ("launcher.slots=2", "launcher.trials_per_job=2", "sweep.run_cap=5", "name=s", "tracker=disabled")
    done = launch(*TINY, f"launcher={kind}", "launcher.poll_s=0.2", *bounded)
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = tmp_path / "outputs" / "s"
    workers = [e["job"]["worker"] for e in events(sweep) if e["event"] == "dispatch"]
    assert ended_states(sweep) == {"completed": 5}
    assert max(map(workers.count, workers)) == 2 and len(set(workers)) >= 3, "no worker runs more than two"
