"""Sweeps: start one, read its trials and its W&B runs; folders of sweeps that nobody ran."""

from __future__ import annotations

import json
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from conftest import events, launch_command
from wandb.proto import wandb_internal_pb2

from helpers.waiting import wait_for
from isaerft_sweep.journal.atomic_files import write_json, write_text
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.journal.layout import SweepFolder, TrialFolder
from isaerft_sweep.journal.worker_queue import Task, WorkerFolder
from isaerft_sweep.results.statistics import pair_values
from isaerft_sweep.trial.worker import serve_trials


def start(cwd: Path, *overrides: str) -> subprocess.Popen[str]:
    with (cwd / "controller.out").open("a") as log:
        return subprocess.Popen(launch_command(*overrides), cwd=cwd, stdout=log, stderr=subprocess.STDOUT, text=True)


def statuses(sweep: Path) -> list[dict[str, Any]]:
    found = []
    for path in sweep.glob("trials/*/status.json"):
        try:
            found.append(json.loads(path.read_text()))
        except FileNotFoundError:
            continue
    return found


def stepping(sweep: Path) -> list[dict[str, Any]]:
    return [s for s in statuses(sweep) if s["state"] == "running" and s.get("step", 0) > 1]


def ended_states(sweep: Path) -> Counter[str]:
    return Counter(e["state"] for e in events(sweep) if e["event"] == "end")


def check_wandb_runs(sweep: Path, trials: int = 3, last_step: int = 4) -> None:
    """Real offline runs, read back from wandb's own files."""
    recorded = [read_wandb_run(path) for path in sweep.glob("trials/*/wandb/wandb/offline-run-*/run-*.wandb")]
    made = [e for e in events(sweep) if e["event"] == "trial"]
    sweep_id = events(sweep)[0]["sweep_id"]
    assert {run.run_id for run, _, _ in recorded} == {e["run_id"] for e in made} and len(recorded) == trials
    for run, summary, steps in recorded:
        event = next(e for e in made if e["run_id"] == run.run_id)
        assert (run.display_name, run.sweep_id, run.run_group, run.job_type) == (event["name"], sweep_id, "s", "trial")
        assert run.project == "orpo-isaerft-sweep" and "isaerft" in run.tags
        assert f"lr_{event['params']['orpo.learning_rate']!r}" in run.tags
        config = {u.key: json.loads(u.value_json) for u in run.config.update}
        assert config["orpo"]["beta"] == event["params"]["orpo.beta"] and "orpo.beta" not in config
        assert summary["state"] == "completed" and "eval/log_odds_chosen" in summary and float(summary["seconds"]) > 0
        assert steps == sorted(set(steps)) and steps[-1] == last_step


def wandb_records(content: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: 7 bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_wandb_run(path: Path) -> tuple[Any, dict[str, Any], list[int]]:
    run, summary, steps = None, {}, []
    for data in wandb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
        elif kind == "summary":
            summary.update({u.key or ".".join(u.nested_key): json.loads(u.value_json) for u in record.summary.update})
        elif kind == "history":
            steps.append(record.history.step.num)
    return run, summary, steps


def serve(folder: WorkerFolder, trials: list[TrialFolder]) -> int:
    """Run a worker in this process, giving it ``trials`` one after the other, then the word to end."""

    def controller() -> None:
        for trial in trials:
            number = folder.claim(Task(str(trial.path), trial.current_attempt()))
            wait_for(lambda n=number: folder.progress().over(n))
            if folder.progress().ending:
                return
        folder.claim(Task(None))

    thread = threading.Thread(target=controller)
    thread.start()
    count = serve_trials(folder, idle_s=20)
    thread.join()
    return count


SPACE = """
method: random
metric: {name: eval/log_odds_chosen, goal: maximize}
parameters:
  orpo.warmup_steps: {values: [5, 10]}
  orpo.beta: {value: 0.1}
"""


def made(path: Path, trials: int = 2) -> Journal:
    """A sweep over warm-up steps whose trials were made and not begun; its journal is open, as a controller holds it."""
    journal = Journal(SweepFolder(path))
    journal.folder.definition.write_text(SPACE)
    journal.write("sweep", sweep_id="s", question="q", metric="eval/log_odds_chosen", goal="maximize")
    for index in range(trials):
        params = {"orpo.warmup_steps": (5, 10)[index % 2], "orpo.beta": 0.1}
        journal.write("trial", index=index, name=f"run-{index}", run_id=f"r{index}", params=params, unit={})
        folder = journal.folder.trial(f"run-{index}").path
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text("{}")
    return journal


def ended(journal: Journal, index: int, state: str, **facts: Any) -> None:
    given = {"metric": None, "message": "", "seconds": 10.0, "given_up": False, "counted": False, "checkpoint": 0, **facts}
    journal.write("end", index=index, state=state, **given)


RNG = np.random.default_rng(0)


YAML = """\
method: random
metric: {name: METRIC, goal: maximize}
run_cap: 9
parameters:
  orpo.learning_rate: {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-1}
  orpo.beta: {values: [0.1, 0.2, 0.4]}
"""


def make_sweep(path: Path, metric: str = "eval/log_odds_chosen", trials: int = 5, pairs: int = 40) -> SweepFolder:
    """A sweep's folder as controller and workers leave it, with made-up scores; trial i is better than trial i − 1."""
    folder = SweepFolder(path)
    journal = Journal(folder)
    write_text(folder.definition, YAML.replace("METRIC", metric))
    journal.write("sweep", sweep_id="s1234567", question="q", metric=metric, goal="maximize")
    names = [f"{i:08x}" for i in range(pairs)]
    base = RNG.normal(-2, 0.5, size=(2, pairs)).clip(max=-0.1)
    for i in range(trials):
        beta, u = (0.1, 0.2, 0.4)[i % 3], (i + 0.5) / trials
        params = {"orpo.learning_rate": 1e-4 * 1000**u, "orpo.beta": beta}
        trial = folder.trial(f"run-tiny-{i}")
        trial.path.mkdir(parents=True)
        journal.write("trial", index=i, name=trial.path.name, run_id=f"r{i}", params=params, unit={"orpo.learning_rate": u})
        chosen, rejected = base[0] + 0.1 * i, base[1] - 0.1 * i
        chosen = np.minimum(chosen, -0.01)
        write_json(trial.evaluation, {"trained": {"step": 4, "pairs": names, "chosen": chosen.tolist(), "rejected": rejected.tolist()}})  # fmt: skip
        scores = {"chosen": chosen, "rejected": rejected}
        metrics = {
            name: float(values.mean())
            for name in ("eval/log_odds_chosen", "eval/rewards/accuracies", "eval/rewards/margins")
            if (values := pair_values(name, scores, beta)) is not None
        }
        metrics["eval/nll_loss"] = 2.0 - 0.1 * i
        write_json(trial.status, {"state": "completed", "attempt": 1, "metrics": metrics, "metric": metrics[metric]})
        journal.write("dispatch", index=i, attempt=1, job={"kind": "local", "pid": 1})
        journal.write("end", index=i, state="completed", metric=metrics[metric], message="", seconds=10.0, given_up=False)
    journal.close()
    return folder


def add_latents(folder: SweepFolder, names: list[str], layers: tuple[int, ...] = (2,), fingerprint: str = "") -> None:
    rng = np.random.default_rng(0)
    for name in names:
        arrays, sites = {}, []
        for n in layers:
            arrays |= {f"{n}.{key}": rng.random(32).astype("float32") for key in ("moved", "share", "before", "after")}
            arrays[f"{n}.vector"] = rng.random(8).astype("float32")
            neuronpedia = f"gemma-2-2b/{n}-gemmascope-res-16k"
            sites.append({"layer": n, "d_sae": 32, "tokens": 100, "neuronpedia_id": neuronpedia, "fingerprint": fingerprint})
        np.savez(folder.trial(name).latents, sites=json.dumps(sites), **arrays)


def rows_for(folder: SweepFolder, name: str, count: int) -> None:
    rows = [{"step": i + 1, "time": 1.0, "train/loss": 3.0 / (i + 1)} for i in range(count)]
    write_text(folder.trial(name).metrics, "".join(json.dumps(row) + "\n" for row in rows))
