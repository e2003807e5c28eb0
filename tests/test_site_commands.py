"""plan, doctor and fetch: what they say on this machine and on a real SLURM."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, launch_command
from helpers.slurm_bed import Bed
from helpers.stand_ins import StandInModelHub, served
from rich.console import Console

from isaerft_sweep.errors import ConfigError
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.status import TrialStatus
from isaerft_sweep.models.random_model import made_folder
from isaerft_sweep.readiness.calibrate import extrapolate_seconds
from isaerft_sweep.readiness.doctor import clocks, preemption, show
from isaerft_sweep.readiness.plan import axis
from isaerft_sweep.readiness.probe import LOCKED, MADE_BEFORE, shared_folder, wandb_server
from isaerft_sweep.specs import Experiment


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "isaerft_sweep.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_trials_time_is_reckoned_from_a_short_one(tmp_path: Path) -> None:
    """Start 10 s, steps of 2 s after a slow first one, an evaluation of 5 s, end 3 s."""
    rows = [{"step": step, "time": 110.0 + 2 * step, "train/loss": 1.0} for step in range(1, 9)]
    rows.append({"step": 8, "time": 126 + 5.0, "eval/loss": 1.0})
    trial = TrialFolder(tmp_path)
    trial.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seconds = extrapolate_seconds(trial, TrialStatus(1, started=100.0, ended=134.0), steps=100, evaluations=5)
    assert seconds == pytest.approx(10 + 100 * 2 + 5 * 5 + 3)
    trial.metrics.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ConfigError, match="at least two steps"):
        extrapolate_seconds(trial, TrialStatus(), 1, 1)


def test_the_axis_shows_every_trial() -> None:
    line = axis([0.0, 0.01, 0.5, 1.0])
    assert line[0] == "2" and line[-1] == "1" and line[len(line) // 2] == "1" and line.count("·") == len(line) - 3
    assert axis([0.5] * 12).count("+") == 1


def test_what_doctor_thinks_of_preemption_and_clocks() -> None:
    assert preemption({"PreemptType": "preempt/none"}, 0).state == "good"
    held = preemption({"PreemptType": "preempt/partition_prio", "PreemptMode": "SUSPEND,GANG"}, 0)
    assert held.state == "good" and "suspended" in held.text
    short = preemption({"PreemptType": "preempt/qos", "PreemptMode": "REQUEUE"}, 0)
    assert short.state == "warning" and "orpo.checkpoint_every_min" in short.remedy
    assert preemption({"PreemptType": "preempt/qos", "PreemptMode": "REQUEUE"}, 60).state == "good"
    assert clocks(-0.5).state == "good" and clocks(90.0).state == "bad"


def test_a_folder_that_is_not_shared_and_a_lock_that_does_not_hold(tmp_path: Path) -> None:
    assert [f.state for f in shared_folder(tmp_path)] == ["bad"]
    (tmp_path / MADE_BEFORE).touch()
    (tmp_path / LOCKED).touch()  # nobody holds it, as where locks do not reach other machines
    found = {f.what: f.state for f in shared_folder(tmp_path)}
    assert found == {"rename": "good", "exclusive link": "good", "file lock": "bad"}


def test_whether_wandb_can_be_reached(experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert wandb_server(experiment(*TINY)).state == "good"
    found = wandb_server(experiment(*TINY, "tracker=wandb"))
    assert found.state == "bad" and "tracker=offline" in found.remedy


@pytest.mark.parametrize(("status", "state"), [(200, "good"), (404, "good"), (503, "bad"), (407, "bad")])
def test_wandb_behind_a_proxy(
    status: int, state: str, experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes that reach the outside through a proxy only, as the environment says it to W&B's own client too."""

    class Proxy:
        asked = ""

        def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
            self.asked = path
            return status, {}

    with served(proxy := Proxy()) as address:
        for name, value in (("WANDB_BASE_URL", "http://wandb.invalid"), ("http_proxy", address), ("no_proxy", "")):
            monkeypatch.setenv(name, value)
        assert wandb_server(experiment(*TINY, "tracker=wandb")).state == state
    assert proxy.asked.startswith("http://wandb.invalid")


@pytest.mark.slow
def test_plan_says_what_would_be_and_submits_nothing(slurm: Bed, tmp_path: Path) -> None:
    options = (*TINY, "sweep=reference", "sweep.method=random", "sweep.run_cap=12", f"output={tmp_path / 'outputs'}")

    def known() -> set[str]:
        """Every job that the cluster remembers; it forgets old ones."""
        return set(slurm.command("squeue", "-h", "-r", "-t", "all", "-o", "%i").split())

    before = known()
    cluster = ("launcher=slurm", "launcher.slots=6", "launcher.slurm.array_parallelism=2", "launcher.timeout_min=10")
    done = cli("plan", *options, *cluster)
    assert done.returncode == 0, done.stderr
    for words in (
        "12 trials",
        "learning_rate  log",
        "--array=0-5%2",
        "partition main",
        "gpus_per_node 1",
        "10 min",
        "--calibrate",
    ):
        assert words in done.stdout, (words, done.stdout)
    assert not (tmp_path / "outputs").exists()
    assert known() <= before
    wrong = cli("plan", *options, *cluster, "launcher.slurm.partition=mian")
    assert wrong.returncode == 2 and "Did you mean 'main'?" in wrong.stderr
    reckoned = cli("plan", *options, *cluster, "--calibrate")
    assert re.search(
        r"a trial \(4 steps, run just now by itself\): .* GPU-hours together", reckoned.stdout.replace("\n", " ")
    ), reckoned.stdout
    calibrated = known() - before
    assert len(calibrated) == 1 and slurm.jobs() == [] and not list((tmp_path / "outputs").iterdir())


@pytest.mark.slow
def test_doctor_looks_from_a_compute_node(slurm: Bed, tmp_path: Path) -> None:
    done = cli("doctor", *TINY, "launcher=slurm", "launcher.slurm.gpus_per_node=0", f"output={tmp_path / 'outputs'}")
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    for words in ("SLURM: bed, version", "SIGTERM and 20 s to exit", "sacct: answers", "file lock: held by the command", "model, SAE, data: in the cache",
                  "clocks: 0.", "0 bad"):  # fmt: skip
        assert words in said, (words, said)
    fake = cli("doctor", *TINY, "launcher=slurm", f"output={tmp_path / 'outputs'}")
    assert fake.returncode == 1 and "the job has GPU 0, but torch" in fake.stdout, "a GPU that is a twin of /dev/null"
    missing = cli(
        "doctor", *TINY, "model=gemma-2-2b", "launcher=slurm", "launcher.slurm.gpus_per_node=0", f"output={tmp_path}"
    )
    assert missing.returncode == 1 and "isaerft-sweep fetch" in missing.stdout
    assert slurm.jobs() == [] and not list((tmp_path / "outputs").iterdir())


@pytest.mark.slow
@pytest.mark.long
def test_fetch_fills_the_cache_from_the_hub(
    experiment: Callable[..., Experiment], saes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, SAE and data from three repositories; then the Hub is gone, and a trial finds all of it."""
    made = made_folder(experiment("model=tiny").model, tmp_path / "made")
    (made / "pytorch_model.bin").write_bytes(b"weights in another format")
    shutil.copytree(saes["jumprelu"], tmp_path / "sae" / "layer_2")
    pairs = tmp_path / "pairs" / "data"
    pairs.mkdir(parents=True)
    for split, count in (("train", 30), ("test", 10)):
        rows = [{"prompt": f"Say {i}.", "chosen": f"{i}, with pleasure.", "rejected": "No."} for i in range(count)]
        (pairs / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hub = StandInModelHub({"org/tiny": made, "org/sae": tmp_path / "sae", "datasets/org/pairs": tmp_path / "pairs"})
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    options = (
        *("model=tiny", "model.name=org/tiny", "model.source=hub", "model.architecture=null", "orpo.max_steps=2"),
        *("adapter.sites=[{layer: 2, sae_release: org/sae, sae_id: layer_2}]", "orpo.max_length=300"),
        *(
            "data=ultrafeedback",
            "orpo=quick",
            "data.name=org/pairs",
            "data.train_split='train[:20]'",
            "data.eval_split=test",
        ),
        *("data.train_size=20", "data.eval_size=8", "tracker=disabled"),
    )
    with served(hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        done = cli("fetch", *options)
    assert done.returncode == 0, done.stderr
    for words in ("org/tiny: 4 layers, hidden size 64", "layer 2, 96 latents (org/sae/layer_2)", "org/pairs: 20 pairs"):
        assert words in done.stdout, done.stdout
    cached = {path.name for path in (tmp_path / "hf").rglob("snapshots/*/*")}
    assert "model.safetensors" in cached and "tokenizer.json" in cached
    assert "pytorch_model.bin" not in cached, "no weights that nothing reads"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the Hub is gone now
    command = launch_command(*options, "sweep=none", "name=s", f"output={tmp_path}", "launcher.threads=1")
    trained = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert trained.returncode == 0, trained.stdout + trained.stderr


@pytest.mark.slow
def test_what_fetch_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "HF_HUB_OFFLINE must not be set" in cli("fetch", *TINY).stderr
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # as on a machine without internet
    away = cli("fetch", *TINY, "model=gemma-2-2b")
    assert away.returncode == 2 and "'google/gemma-2-2b' could not be fetched" in away.stderr


def test_a_finding_is_shown_with_its_remedy() -> None:
    console = Console(record=True, width=100)
    show(console, [clocks(90.0)])
    said = console.export_text()
    assert "BAD" in said and "launcher.heartbeat_s" in said
