"""Checks the server against one version of wandb: ``python tests/compatibility.py BIN``, where BIN holds its python and wandb.

It needs nothing but wandb there: the server runs in this interpreter's environment. `nox` runs it over several versions.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers.serving import Serving
from helpers.waiting import wait_for

from isaerft_sweep.config.compose import compose
from isaerft_sweep.journal.atomic_files import write_json
from isaerft_sweep.spec_fields import to_dict
from isaerft_sweep.specs import TrialSpec
from isaerft_sweep.tracking.wandb_run import ADAPTER_FILES

PROGRAM = """\
import os, sys, time, wandb
run = wandb.init(resume="allow", settings=wandb.Settings(silent=True))
first = run.starting_step  # run.step of 0.31 is 0 until the first log, whatever the server says
mode = run.config.get("mode")
for step in range(first, 6):
    run.log({"loss": run.config.lr + 1 / (1 + step)}, step=step)
    if mode == "preempted" and first == 0 and step == 3:
        run.mark_preempting()
        run.finish(exit_code=1)
        sys.exit(1)
    if mode == "long":
        for _ in range(600):
            time.sleep(0.1)
run.finish()
"""
CONFIG = """\
program: train.py
method: grid
metric: {{name: loss, goal: minimize}}
parameters: {{lr: {{values: [0.1, 0.2]}}, mode: {{value: {mode}}}}}
command: ["${{env}}", "{python}", "${{program}}"]
"""
READ = """\
import json, sys, wandb
api = wandb.Api()
sweep = api.sweep(sys.argv[1])
runs = {run.id: [run.state, [row["_step"] for row in run.scan_history()], run.summary.get("loss"), len(run.history(pandas=False))] for run in sweep.runs}
print(json.dumps([sweep.state, sweep.best_run().id, runs, [f.name for f in sweep.best_run().files()]]))
"""
OFFLINE = """\
import wandb
run = wandb.init(id="offline1", project="demo", name="kept", settings=wandb.Settings(silent=True))
for step in range(3):
    run.log({"loss": step}, step=step)
run.finish()
"""

TRACKER = """\
import json, sys
from pathlib import Path
from isaerft_sweep.specs import TrialSpec
from isaerft_sweep.tracking.wandb_run import WandbRun

spec, again = TrialSpec.from_json(json.loads(Path("spec.json").read_text())), sys.argv[1] == "again"
run = WandbRun(spec, Path("tracked"), offline=False)
assert not run.lost and run.can_receive_stop and run.sweep_url
for step in range(4):  # a second attempt hands over what the first one may not have got rid of
    (run.replay if again else run.log)({"loss": 1 / (1 + step)}, step)
if again:
    run.log({"loss": 0.1}, 4)
    run.log_adapter(Path("adapter"), spec.model_name)
run.finish({"state": "completed" if again else "stopped"}, exit_code=0 if again else 1, preempted=not again)
assert not run.lost
"""
"""A trial's own tracker, in two attempts."""
TOLD = """\
import json, sys, wandb
run = wandb.Api().run(sys.argv[1])
print(json.dumps([run.state, [row["_step"] for row in run.scan_history()], run.name, run.group, run.job_type, sorted(run.tags),
                  run.config["orpo"]["beta"], run.summary.get("state")]))
"""

READING = """\
import json, wandb
from pathlib import Path
settings = wandb.Settings(silent=True)
for attempt in range(2):
    run = wandb.init(id="twice", project="demo", settings=settings, reinit=True)
    run.define_metric("acc", summary="max")
    for step in range(2500 - 1000 * attempt):
        run.log({"acc": attempt + (step == 3), "val": {"acc": step}})
    Path("data.txt").write_text(f"rows {attempt}")
    made = wandb.Artifact("rows", type="dataset")
    made.add_file("data.txt", name="deep/100% #1.txt")
    run.log_artifact(made, aliases=[f"try{attempt}", "latest"]).wait()
    run.finish()
run = wandb.init(id="reader", project="demo", settings=settings, reinit=True)
folder = run.use_artifact("rows:try0").download()
run.finish()
api = wandb.Api()
found = api.run("demo/twice")
print(json.dumps([[row["val.acc"] for row in found.scan_history(keys=["_step", "val.acc"])], len(list(found.scan_history())),
                  len(found.history(keys=["acc"], pandas=False)), found.summary["acc"]["max"], Path(folder, "deep/100% #1.txt").read_text(),
                  api.artifact("demo/rows:latest").version, sorted(api.artifact("demo/rows:v0").aliases),
                  [a.name for a in api.artifacts("dataset", "demo/rows")], [f.name for f in api.artifact("demo/rows:v0").files()],
                  [c.name for c in api.artifact_type("dataset", "demo").collections()]]))
"""


class Client(Serving):
    """A server, and another wandb than this interpreter's to speak to it."""

    def __init__(self, folder: Path, bin_folder: Path) -> None:
        super().__init__(folder, "--crash-after", "60")
        self.bin = bin_folder

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "PATH": f"{self.bin}:{os.environ['PATH']}"}

    def write_sweep(self, mode: str) -> str:
        file = self.folder / f"{mode}.yaml"
        file.write_text(CONFIG.format(mode=mode, python=self.bin / "python"))
        return self.sweep(file)

    def read(self, path: str) -> tuple[str, str, dict[str, list[object]], list[str]]:
        done = self.run(str(self.bin / "python"), "-c", READ, path)
        assert done.returncode == 0, done.stderr
        state, best, runs, files = json.loads(done.stdout.splitlines()[-1])
        return state, best, runs, files


def check_a_sweep(client: Client) -> None:
    """Two trials, then what wandb.Api reads of them."""
    path = client.write_sweep("short")
    assert client.agent(path, "short").wait(300) == 0
    state, best, runs, files = client.read(path)
    assert state == "FINISHED" and len(runs) == 2, (state, runs)
    assert all(run[:2] == ["finished", list(range(6))] and run[3] == 6 for run in runs.values()), runs
    assert runs[best][2] == min(run[2] for run in runs.values())  # type: ignore[type-var]
    assert "config.yaml" in files


def check_preemption(client: Client) -> None:
    """A trial that says it is preempted goes on with its id, every step once."""
    path = client.write_sweep("preempted")
    assert client.agent(path, "preempted").wait(300) == 0
    _, _, runs, _ = client.read(path)
    assert [run[:2] for run in runs.values()] == [["finished", list(range(6))]] * 2, runs
    given = [e["run_id"] for e in client.journal(path) if e["event"] == "trial"]
    assert len(given) == 2 and [e["event"] for e in client.journal(path)].count("dispatch") == 4


def check_states(client: Client) -> None:
    """Pause, resume and cancel from the command line; the trial hears of it."""
    path = client.write_sweep("long")
    assert client.run("wandb", "sweep", "--pause", path).returncode == 0
    agent = client.agent(path, "long")
    time.sleep(7)
    assert not [e for e in client.journal(path) if e["event"] == "trial"], "a paused sweep hands nothing out"
    assert client.run("wandb", "sweep", "--resume", path).returncode == 0
    run = wait_for(lambda: next((e["run_id"] for e in client.journal(path) if e["event"] == "trial"), None), timeout_s=120)
    log = client.data / "runs" / "local" / "demo" / f"{run}.jsonl"
    wait_for(lambda: log.exists() and '"running"' in log.read_text(), timeout_s=120)
    assert client.run("wandb", "sweep", "--cancel", path).returncode == 0
    assert agent.wait(400) == 0
    assert '"killed"' in log.read_text(), "the trial was interrupted and says how it ended"


def check_offline(client: Client) -> None:
    """An offline run, synced, belongs to its sweep."""
    path = client.write_sweep("short")
    environment = {
        **client.environment,
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": path.rpartition("/")[2],
        "WANDB_RUN_ID": "offline1",
        "WANDB_PROJECT": "demo",
    }
    subprocess.run(
        [client.bin / "python", "-c", OFFLINE], cwd=client.folder, env=environment, check=True, capture_output=True
    )
    folder = next(client.folder.glob("wandb/offline-run-*"))
    done = client.run("wandb", "sync", "-p", "demo", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    _, _, runs, _ = client.read(path)
    assert runs["offline1"][:2] == ["finished", [0, 1, 2]], runs


def check_our_tracker(client: Client) -> None:
    """What a trial does with wandb: one run over two attempts, with its name, tags, config, summary and adapter."""
    path, python = client.write_sweep("short"), str(client.bin / "python")
    experiment = compose(["model=tiny", "tracker=wandb", "tracker.project=demo"])
    spec = TrialSpec(
        index=0, name="run-tiny", model_name="TINY_run-tiny", run_id="tracked1", sweep_id=path.rpartition("/")[2],
        sweep_name="s", identity="i", created="2025-02-28T22:28:00", params={}, metric="loss", goal="minimize",
        tags=("isaerft", "beta_0.1"), command="", git_commit=None, experiment=experiment,
    )  # fmt: skip
    write_json(client.folder / "spec.json", to_dict(spec))
    (client.folder / "adapter").mkdir()
    for name in ADAPTER_FILES:
        (client.folder / "adapter" / name).write_text("{}")
    environment = {**client.environment, "PYTHONPATH": str(Path(__file__).parent.parent)}
    for attempt in ("first", "again"):
        command = [python, "-c", TRACKER, attempt]
        done = subprocess.run(command, cwd=client.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "not in W&B" not in done.stderr, done.stdout + done.stderr
    done = client.run(python, "-c", TOLD, "local/demo/tracked1")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == [
        "finished",
        list(range(5)),
        "run-tiny",
        "s",
        "trial",
        ["beta_0.1", "isaerft"],
        experiment.orpo.beta,
        "completed",
    ], told
    assert list(client.data.rglob("adapter_model.safetensors")) or any(
        "safetensors" in p.read_text(errors="replace") for p in client.data.rglob("*.jsonl")
    )


def check_reading(client: Client) -> None:
    """A run that is begun twice, its rows by keys and whole, and artifacts that are handed on."""
    done = client.run(str(client.bin / "python"), "-c", READING)
    assert done.returncode == 0, done.stdout + done.stderr
    rows, whole, sampled, best, text, latest, aliases, *listed = json.loads(done.stdout.splitlines()[-1])
    assert rows == list(range(1500)) and (whole, sampled, best) == (1500, 500, 2), (len(rows), whole, sampled, best)
    assert (text, latest, aliases) == ("rows 0", "v1", ["try0"]), (text, latest, aliases)
    assert listed == [["rows:v1", "rows:v0"], ["deep/100% #1.txt"], ["rows"]], listed


def main() -> None:
    bin_folder = Path(sys.argv[1]).absolute()
    version = subprocess.run(
        [bin_folder / "python", "-c", "import wandb; print(wandb.__version__)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.py").write_text(PROGRAM)
        client = Client(Path(folder), bin_folder)
        client.start()
        try:
            for check in (check_a_sweep, check_preemption, check_states, check_offline, check_our_tracker, check_reading):
                began = time.monotonic()
                check(client)
                print(f"wandb {version}: {re.sub('_', ' ', check.__name__)}: {time.monotonic() - began:.0f} s", flush=True)
        finally:
            client.kill(signal.SIGTERM)


if __name__ == "__main__":
    main()
