"""Runs handed on to another server by ``isaerft-sweep sync`` and the real ``wandb sync``; and trials through an outage."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import TINY, events, launch_command
from helpers.served_sweeps import read_sweep
from helpers.serving import BIN, Serving
from helpers.sweeps import read_wandb_run
from helpers.waiting import wait_for

from isaerft_sweep.cli import main
from isaerft_sweep.errors import SyncError
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.tracking import upload
from isaerft_sweep.tracking.wandb_run import open_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROGRAM = """\
import wandb
run = wandb.init(name="named", tags=["t1"], settings=wandb.Settings(silent=True, x_disable_stats=True))
for step in range(5):
    run.log({"loss": run.config.lr / (1 + step), "deep": {"a": step}}, step=step)
run.save("note.txt", policy="now")
made = wandb.Artifact("out", type="model", description="made", metadata={"lr": run.config.lr})
with made.new_file("deep/100% #1.txt") as file:
    file.write(run.id)
run.log_artifact(made, aliases=["of-" + run.id])
run.finish()
"""
ARTIFACT = """
import json, sys, wandb
from pathlib import Path
api = wandb.Api()
found = {}
for name in sys.argv[1:]:
    one = api.artifact(f"demo/out:of-{name}")
    found[name] = [Path(one.download(root=name), "deep/100% #1.txt").read_text(), one.description, one.metadata, one.logged_by().id]
print(json.dumps(found))
"""
CONFIG = """\
program: train.py
name: handed on
method: random
metric: {name: loss, goal: minimize}
run_cap: 2
parameters: {lr: {distribution: log_uniform_values, min: 1.0e-4, max: 1.0}}
command: ["${env}", "${interpreter}", "${program}"]
"""


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    server = Serving(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Serving]:
    folder = tmp_path / "target"
    folder.mkdir()
    server = Serving(folder)
    server.start()
    yield server
    server.kill()


def sync(target: Serving, *arguments: str) -> subprocess.CompletedProcess[str]:
    return target.run(str(BIN / "isaerft-sweep"), "sync", *arguments, "--to", target.address, timeout_s=600)


@pytest.mark.long
def test_served_runs_go_to_another_server_with_their_ids(serving: Serving, target: Serving, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PROGRAM)
    (tmp_path / "note.txt").write_text("a note")
    (tmp_path / "s.yaml").write_text(CONFIG)
    path = serving.sweep(tmp_path / "s.yaml")
    assert serving.agent(path, "agent").wait(300) == 0, (tmp_path / "agent.out").read_text()
    before = read_sweep(serving, path)
    done = sync(target, str(serving.data))
    assert done.returncode == 0 and "2 of 2 runs uploaded" in done.stdout, done.stdout + done.stderr
    after = read_sweep(target, path)
    assert after["best"] == before["best"] and after["runs"].keys() == before["runs"].keys()
    for name, run in before["runs"].items():
        other = after["runs"][name]
        assert [run[k] for k in ("name", "state", "steps", "config", "tags")] == [
            other[k] for k in ("name", "state", "steps", "config", "tags")
        ]
        assert run["summary"]["loss"] == other["summary"]["loss"]
        assert (target.data / "runs" / "local" / "demo" / name / "note.txt").read_text() == "a note"
    told = target.run(sys.executable, "-c", ARTIFACT, *before["runs"])
    wanted = {name: [name, "made", {"lr": run["config"]["lr"]}, name] for name, run in before["runs"].items()}
    assert json.loads(told.stdout.splitlines()[-1]) == wanted, told.stderr
    again = sync(target, str(serving.data))
    assert again.returncode == 0, again.stderr
    assert read_sweep(target, path)["runs"][name]["steps"] == list(range(5)), "uploaded twice, there once"
    unknown = sync(target, str(tmp_path / "target"))
    assert unknown.returncode == 2 and "no run in it is left" in unknown.stderr


def test_an_offline_sweep_of_the_embedded_controller_goes_to_a_server(target: Serving, tmp_path: Path) -> None:
    done = subprocess.run(
        launch_command(*TINY, "name=s", "sweep.run_cap=2"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "s"
    sweep_id = events(folder)[0]["sweep_id"]
    synced = sync(target, str(folder))
    assert synced.returncode == 0 and "2 of 2 runs uploaded" in synced.stdout, synced.stdout + synced.stderr
    found = read_sweep(target, f"local/orpo-isaerft-sweep/{sweep_id}")
    made = [e for e in events(folder) if e["event"] == "trial"]
    assert set(found["runs"]) == {e["run_id"] for e in made}
    for event in made:
        run = found["runs"][event["run_id"]]
        assert run["name"] == event["name"] and run["state"] == "finished" and run["steps"][-1] == 4
        assert run["config"]["orpo"]["beta"] == event["params"]["orpo.beta"]
    adapters = {path.parent.parent.name for path in target.data.glob("artifacts/*/files/adapter_model.safetensors")}
    assert len(adapters) == 2, "what they have learnt goes along"
    board = target.run(str(BIN / "isaerft-sweep"), "leaderboard", f"wandb:local/orpo-isaerft-sweep/{sweep_id}")
    assert board.returncode == 0 and "eval/log_odds_chosen, maximize" in board.stdout, board.stderr
    again = sync(target, str(folder))
    assert again.returncode == 2 and "left to upload" in again.stderr, "they are marked as uploaded"


def test_uploads_wait_for_a_server_that_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def sometimes() -> None:
        tries.append(time.monotonic())
        if len(tries) < 4:
            raise upload.Unreachable("not now")

    upload._retried(sometimes, 0.01)
    gaps = [b - a for a, b in itertools.pairwise(tries)]
    assert len(tries) == 4 and gaps == sorted(gaps), "each pause is longer than the one before"
    with pytest.raises(SyncError, match="not now"):
        upload._retried(lambda: (_ for _ in ()).throw(upload.Unreachable("not now")), 0.001)


@pytest.mark.parametrize(
    ("words", "lasting"),
    [
        ("ERROR Error while calling W&B API: permission denied (<Response [403]>)", True),
        ("wandb: ERROR 401 Client Error: Unauthorized", True),
        ("returned error 404: run not found", True),
        ("dial tcp 127.0.0.1:14030: connect: connection refused", False),
        ("run a403b: the server answers 503", False),
        ("HTTP 429: too many requests", False),
    ],
)
def test_what_no_second_try_would_change(words: str, lasting: bool) -> None:
    failure = upload._failure(words, upload.Target("http://127.0.0.1:14030", "k"))
    assert isinstance(failure, upload.Unreachable) is not lasting


def test_a_wrong_key_and_no_key(
    target: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main(["sync", str(tmp_path)]) == 2
    assert "must be in WANDB_API_KEY" in capsys.readouterr().err
    with pytest.raises(SyncError, match="does not take the key"):
        upload._query(upload.Target(target.address, "k" * 40), "query Viewer { viewer { entity } }", {})


@pytest.mark.usefixtures("paced")
@pytest.mark.long
def test_a_trial_goes_on_while_its_server_is_away(serving: Serving, tmp_path: Path) -> None:
    """Killed in the middle of a trial, back while it still runs: every step is there in the end."""
    options = (
        *TINY,
        "name=s",
        "sweep.run_cap=1",
        "tracker=wandb",
        "orpo.max_steps=120",
        "orpo.checkpoint_every_steps=50",
    )
    with (tmp_path / "launch.out").open("w") as out:
        launch = subprocess.Popen(
            launch_command(*options), cwd=tmp_path, env=serving.environment, stdout=out, stderr=subprocess.STDOUT
        )

    def rows() -> list[str]:
        return [line for path in tmp_path.glob("outputs/s/trials/*/metrics.jsonl") for line in path.read_text().splitlines()]

    wait_for(lambda: len(rows()) > 20)
    serving.kill(signal.SIGKILL)
    reached = len(rows())
    wait_for(lambda: len(rows()) > reached + 30)
    serving.start()
    assert launch.wait(600) == 0, (tmp_path / "launch.out").read_text()
    run_id = next(e["run_id"] for e in events(tmp_path / "outputs" / "s") if e["event"] == "trial")
    log = serving.data / "runs" / "local" / "orpo-isaerft-sweep" / f"{run_id}.jsonl"
    states = [json.loads(line).get("set", {}).get("state") for line in log.read_text().splitlines()]
    assert [s for s in states if s][-1] == "finished"
    done = serving.run(
        sys.executable,
        "-c",
        "import sys, wandb, json; r = wandb.Api().run(sys.argv[1]); print(json.dumps([x['_step'] for x in r.scan_history()]))",
        f"local/orpo-isaerft-sweep/{run_id}",
    )
    assert json.loads(done.stdout.splitlines()[-1]) == list(range(0, 121)), done.stderr
    made = events(tmp_path / "outputs" / "s")[0]["sweep_id"]
    known = read_sweep(serving, f"local/orpo-isaerft-sweep/{made}")
    assert known["state"] == "FINISHED" and set(known["runs"]) == {run_id}, "the server was told of the sweep at its start"


@pytest.mark.long
def test_a_trial_whose_server_stays_away_ends_and_is_uploaded_later(serving: Serving, tmp_path: Path) -> None:
    options = (*TINY, "name=s", "sweep.run_cap=1", "tracker=wandb", "orpo.max_steps=40")
    with (tmp_path / "launch.out").open("w") as out:
        environment = {**serving.environment, "WANDB_FINISH_TIMEOUT": "3"}
        launch = subprocess.Popen(
            launch_command(*options), cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    wait_for(lambda: any(path.read_text() for path in tmp_path.glob("outputs/s/trials/*/metrics.jsonl")))
    serving.kill(signal.SIGKILL)
    assert launch.wait(300) == 0, (tmp_path / "launch.out").read_text()
    made, ended = (next(e for e in events(tmp_path / "outputs" / "s") if e["event"] == name) for name in ("trial", "end"))
    assert ended["state"] == "completed" and ended["message"] == ""
    log = next(tmp_path.glob("outputs/s/trials/*/log.out")).read_text()
    assert "W&B is lost (Timed out finishing run.)" in log and "isaerft-sweep sync" in log
    assert "the adapter is not in W&B" in log and "/adapter." in log
    serving.start()
    synced = sync(serving, str(tmp_path / "outputs" / "s"))
    assert synced.returncode == 0 and "1 of 1 runs uploaded" in synced.stdout, synced.stdout + synced.stderr
    run = read_sweep(serving, f"local/orpo-isaerft-sweep/{events(tmp_path / 'outputs' / 's')[0]['sweep_id']}")["runs"]
    assert run[made["run_id"]]["steps"] == list(range(41)) and run[made["run_id"]]["state"] == "finished"


@pytest.mark.long
def test_a_trial_without_a_server_keeps_its_run_on_disk(serving: Serving, tmp_path: Path) -> None:
    serving.kill()
    environment = {**serving.environment, "WANDB_INIT_TIMEOUT": "5", "WANDB_HTTP_TIMEOUT": "2"}
    done = subprocess.run(
        launch_command(*TINY, "name=s", "sweep.run_cap=1", "tracker=wandb"),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    log = next(tmp_path.glob("outputs/s/trials/*/log.out")).read_text()
    assert "W&B could not be reached" in log and "isaerft-sweep sync" in log
    assert upload.offline_runs(tmp_path / "outputs" / "s"), "and it can be uploaded later"


def test_a_service_of_wandb_that_is_killed_costs_the_runs_of_that_moment(
    trial: Callable[..., TrialFolder], tmp_path: Path
) -> None:
    """wandb keeps runs in a process of its own; scancel and a full memory kill it too. The worker's next trials have theirs."""
    specs = [trial("tracker=offline", f"orpo.seed={i}", name=f"t{i}").read_spec() for i in range(3)]
    specs = [replace(spec, run_id=f"killed{i:02d}") for i, spec in enumerate(specs)]
    first, beside = open_run(specs[0], tmp_path / "first"), open_run(specs[1], tmp_path / "beside")
    first.log({"train/loss": 3.0}, 1)
    for process in psutil.Process().children(recursive=True):
        if "wandb-core" in process.name():
            process.kill()
            process.wait()
    first.log({"train/loss": 2.0}, 2)
    wait_for(lambda: first.log({"train/loss": 1.0}, 3) or first.lost)
    after = open_run(specs[2], tmp_path / "after")
    after.log({"train/loss": 3.0}, 1)
    beside.log({"train/loss": 2.0}, 2)  # learns it now, and leaves the new service alone
    after.log({"train/loss": 2.0}, 2)
    for run in (first, beside, after):
        run.finish({"state": "completed"}, exit_code=0)
    assert [run.lost for run in (first, beside, after)] == [True, True, False]
    (kept,) = (tmp_path / "after").glob("wandb/offline-run-*/run-*.wandb")
    wait_for(
        lambda: read_wandb_run(kept)[2] == [1, 2], timeout_s=60
    )  # on a busy machine wandb writes the last of it a moment later
    wait_for(lambda: read_wandb_run(kept)[1].get("state") == "completed", timeout_s=60)
