"""What is asked of a SLURM cluster: its own settings, valid flags, arrays, limits, the code of the moment of submission."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from conftest import TINY, events
from helpers import slurm_bed
from helpers.slurm_bed import Bed
from helpers.slurm_jobs import CPU, GPU, SITE, Note, count_calls, parameters
from helpers.sweeps import ended_states, start, stepping
from helpers.waiting import wait_for
from hypothesis import given
from hypothesis import strategies as st

from isaerft_sweep.dispatch.slurm.cluster import SlurmCluster, minutes, parse_gres, parse_kind, read_cluster
from isaerft_sweep.dispatch.slurm.dispatcher import SlurmDispatcher, job_name
from isaerft_sweep.dispatch.slurm.sbatch_flags import working_s
from isaerft_sweep.dispatch.snapshot import code_snapshot
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.specs import LauncherSpec

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # jobs cannot import tests


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("(null)", {}),
        ("gpu:2", {"gpu": 2}),
        ("gpu:a100:4(S:0-1)", {"gpu": 4, "gpu:a100": 4}),
        ("gpu:a100:2,gpu:v100:1,disk:100", {"gpu": 3, "gpu:a100": 2, "gpu:v100": 1, "disk": 100}),
        ("craynetwork", {"craynetwork": 1}),
    ],
)
def test_generic_resources(text: str, counts: dict[str, int]) -> None:
    assert parse_gres(text) == counts


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59))
def test_time_limits(days: int, hours: int, mins: int) -> None:
    assert minutes(f"{days}-{hours:02}:{mins:02}:00") == (days * 24 + hours) * 60 + mins
    assert minutes(f"{hours}:{mins:02}:30") == hours * 60 + mins and minutes(f"{mins}:00") == mins
    assert minutes("infinite") is None


@given(st.integers(1, 100_000), st.floats(0.1, 1e5))
def test_every_job_works_before_it_ends(time_min: int, grace_s: float) -> None:
    assert time_min * 45 <= working_s(time_min, grace_s) < time_min * 60


def test_a_line_of_sinfo() -> None:
    kind = parse_kind("gpu|gpu*|64+|512000|2-00:00:00|a100,nvlink|gpu:a100:4")
    assert kind == dataclasses.replace(GPU, gres={"gpu": 4, "gpu:a100": 4})


def test_defaults_are_the_clusters() -> None:
    found = parameters()
    assert (found["gpus_per_node"], found["cpus_per_task"], found["mem"], found["time"]) == (1, 4, "32768MB", 240)
    found = parameters(partition="cpu")
    assert "gpus_per_node" not in found and found["cpus_per_task"] == 4
    short = SlurmCluster({}, (dataclasses.replace(GPU, max_min=30, cpus=8, memory_mb=16_000),))
    found = parameters(short)
    assert (found["cpus_per_task"], found["mem"], found["time"]) == (2, "4000MB", 30)


def test_what_a_users_shell_sets_counts_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SBATCH_QOS", "high")
    free = dataclasses.replace(SITE, qos=None)
    assert parameters(free)["qos"] == "high" and parameters(free, qos="low")["qos"] == "low"
    with pytest.raises(LaunchError, match="qos is not yours to use"):
        parameters(dataclasses.replace(SITE, qos=("normal",)))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "qos" not in parameters(free), "within a job the variable is that job's"


def test_flags_are_carried() -> None:
    found = parameters(comment="c", mail_user="me@here", setup=["module load x"], job_name="mine", mem_gb=1.5)
    assert found["comment"] == "c" and found["setup"] == ["module load x"] and found["job_name"] == "mine-s"
    assert found["mem"] == "1536MB" and found["mail_user"] == "me@here"
    assert found["additional_parameters"] == {"no-requeue": True, "signal": "USR2@0"}
    assert "gpus_per_node" not in parameters(gres="gpu:a100:2")


@pytest.mark.parametrize(
    ("slurm", "said"),
    [
        ({"partition": "gpus"}, "partition is unknown: 'gpus'. Did you mean 'gpu'? Valid: cpu, gpu."),
        ({"account": "lob"}, "account is not yours to use: 'lob'. Did you mean 'lab'? Valid: lab, other."),
        ({"qos": "high"}, "qos is not yours to use: 'high'. Valid: normal."),
        ({"constraint": "a100&nvlnk"}, "unknown feature: 'nvlnk'. Did you mean 'nvlink'? Valid: a100, nvlink."),
        ({"gres": "gpu:h100:1"}, "unknown resource: 'gpu:h100'. Did you mean 'gpu:a100'? Valid: gpu, gpu:a100."),
        ({"gres": "gpu:a100:8"}, "gres must be at most 4, the largest node's, but got gpu:a100:8."),
        ({"gpus_per_node": 5}, "gpus_per_node must be at most 4"),
        ({"gpus_per_node": 1, "partition": "cpu"}, "gpus_per_node must name GPUs of the nodes but got 1. Valid: none."),
        ({"cpus_per_task": 65}, "cpus_per_task must be at most 64"),
        ({"mem_gb": 501}, "mem_gb must be at most 500 GB"),
        ({"time": 10}, "launcher.slurm.time must not be set here. What decides it: launcher.timeout_min."),
        ({"requeue": True}, "the controller itself retries a trial"),
    ],
)
def test_what_is_wrong_is_told_with_what_is_valid(slurm: dict[str, Any], said: str) -> None:
    with pytest.raises(LaunchError) as error:
        parameters(**slurm)
    assert said in str(error.value)


def test_a_time_limit_and_a_cluster_without_a_default_partition() -> None:
    with pytest.raises(LaunchError, match=r"at most the partition's limit \(gpu 2880 min\) but got 2881"):
        parameters(timeout_min=2881)
    with pytest.raises(LaunchError, match=r"must be set, since this cluster has no default one\. Valid: cpu\."):
        parameters(SlurmCluster({}, (CPU,)))
    assert parameters(partition="cpu", timeout_min=99999)["time"] == 99999


@pytest.mark.slow
def test_what_a_real_cluster_says(slurm: Bed) -> None:
    site = read_cluster()
    assert site.partitions == ("main", "urgent", "hasty", "short") and site.default_partition == "main"
    assert site.array_size == 1001 and site.accounts == ("lab", "root") and set(site.qos or ()) == {"few", "normal"}
    assert {kind.max_min for kind in site.kinds_of("short")} == {5} and site.kinds[0].gpus == 2
    with pytest.raises(LaunchError, match=r"has no 'reservtion'.*Did you mean 'reservation'"):
        parameters(site, reservtion="x")


@pytest.mark.slow
def test_real_flags_of_a_real_array(slurm: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(tmp_path, monkeypatch, "squeue", "sacct", "sbatch")
    flags = {
        "partition": "main", "account": "lab", "qos": "normal", "constraint": "big|small", "mem_gb": 1, "comment": "why not",
        "mail_type": "NONE", "gres": "gpu:fake:2", "nice": 7, "setup": [f"touch {tmp_path}/set-up"], "array_parallelism": 3,
    }  # fmt: skip
    dispatcher = SlurmDispatcher(
        LauncherSpec(kind="slurm", slots=6, timeout_min=7, slurm=flags), tmp_path / "sweep s" / "jobs"
    )
    refs = dispatcher.submit_all([Note(str(tmp_path / f"mark{i}")) for i in range(6)])  # type: ignore[arg-type]
    shown = slurm.command("scontrol", "show", "job", refs[0].id)
    for word in (
        "Account=lab",
        "QOS=normal",
        "Partition=main",
        "TimeLimit=00:07:00",
        "Nice=7",
        "Comment=why not",
        "Requeue=0",
    ):
        assert word in shown, word
    assert "Features=big|small" in shown and "gres:gpu:fake:2" in shown and "MinMemoryNode=1G" in shown
    assert "ArrayTaskThrottle=3" in shown
    polls = 0
    while any(dispatcher.alive(refs)):
        polls += 1
        assert polls < 600
        time.sleep(0.1)
    assert len(list(tmp_path.glob("mark*"))) == 6 and (tmp_path / "set-up").exists()
    lines = calls.read_text().splitlines()
    assert len([line for line in lines if line.startswith("sbatch") and "--help" not in line]) == 1
    assert len([line for line in lines if line.startswith(("squeue", "sacct"))]) == polls + 1, (
        "one query a poll for six jobs"
    )


@pytest.mark.slow
def test_jobs_are_found_under_the_name_they_were_given_and_one_scancel_ends_an_array(
    slurm: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = LauncherSpec(kind="slurm", slots=6, slurm={"hold": True})
    first = SlurmDispatcher(held, tmp_path / "s" / "jobs")
    refs = first.submit_all([Note(str(tmp_path / f"mark{i}")) for i in range(6)])  # type: ignore[arg-type]
    moved = SlurmDispatcher(LauncherSpec(kind="slurm", slurm={"job_name": "a b"}), tmp_path / "link" / "jobs")
    assert moved.name.startswith("a-b-") and moved.alive(refs) == [True] * 6
    calls = count_calls(tmp_path, monkeypatch, "scancel")
    moved.kill(refs[2:4])
    wait_for(lambda: moved.alive(refs) == [True, True, False, False, True, True])
    moved.kill(refs)
    wait_for(lambda: not any(moved.alive(refs)))
    array = refs[0].id.split("_")[0]
    assert calls.read_text().splitlines() == [f"{array}_2 {array}_3", array]


@pytest.mark.slow
def test_a_site_that_takes_few_jobs_at_a_time(slurm: Bed, launch: Callable, tmp_path: Path) -> None:
    """Six workers are asked for, and a qos takes three."""
    options = ("launcher=slurm", "launcher.poll_s=0.3", "launcher.slots=6", "launcher.slurm.qos=few", "sweep.run_cap=6")
    done = launch(*TINY, *options, "name=s", "tracker=disabled")
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = tmp_path / "outputs" / "s"
    assert ended_states(sweep) == {"completed": 6}
    assert len({e["job"]["job"]["id"] for e in events(sweep) if e["event"] == "dispatch"}) == 3
    left = [path for path in (sweep / "jobs").iterdir() if re.fullmatch(r"[0-9a-f]{32}\.pkl", path.name)]
    assert not left, "nothing is left of jobs that were refused"


@pytest.mark.slow
def test_arrays_are_split_at_the_sites_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := slurm_bed.why_not():
        pytest.skip(reason)
    with slurm_bed.running_bed(accounting=False, MaxArraySize="3") as bed:
        monkeypatch.setenv("SLURM_CONF", str(bed.conf))
        flags = {"hold": True, "array_parallelism": 6}
        dispatcher = SlurmDispatcher(LauncherSpec(kind="slurm", slots=8, slurm=flags), tmp_path / "s" / "jobs")
        refs = dispatcher.submit_all([Note(str(tmp_path / f"mark{i}")) for i in range(8)])  # type: ignore[arg-type]
        sizes = Counter(ref.id.split("_")[0] for ref in refs)
        assert sorted(sizes.values()) == [2, 3, 3] and dispatcher.alive(refs) == [True] * 8
        throttles = {
            bed.command("scontrol", "show", "job", array).split("ArrayTaskThrottle=")[1].split()[0] for array in sizes
        }
        assert throttles == {"2"}, "three arrays share six"


@pytest.mark.slow
def test_no_cluster_and_a_wrong_partition(
    slurm: Bed, launch: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = launch(*TINY, "launcher=slurm", "launcher.slurm.partition=mian", "name=s")
    assert done.returncode == 2 and "Did you mean 'main'? Valid: hasty, main, short, urgent." in done.stderr, done.stderr
    assert not (tmp_path / "outputs" / "s" / "trials").exists() and "checking model" not in done.stdout
    monkeypatch.setenv("PATH", "/nowhere")
    done = launch(*TINY, "launcher=slurm", "name=t")
    assert done.returncode == 2 and "there is no 'scontrol'. Start it on a login node, or use launcher=local" in done.stderr


@pytest.mark.slow
def test_a_queued_job_runs_the_code_of_the_moment_of_submission(slurm: Bed, tmp_path: Path) -> None:
    """The package is changed, fatally, while the job waits in the queue."""
    work = tmp_path / "work"
    checkout = code_snapshot(tmp_path / "checkout")  # a checkout that can be broken
    (checkout / "conf").symlink_to(Path(__file__).parent.parent / "conf")
    (checkout / "sweeps").symlink_to(Path(__file__).parent.parent / "sweeps")
    work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(checkout))
        blocker = slurm.command(
            "sbatch", "--parsable", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 600"
        ).strip()
        options = (
            "launcher=slurm",
            "launcher.poll_s=0.3",
            "name=s",
            "sweep.run_cap=1",
            "tracker=disabled",
            "launcher.slots=1",
        )
        controller = start(work, *TINY, *options)
        wait_for(lambda: len(slurm.jobs()) == 2)
        (checkout / "isaerft_sweep" / "trial" / "resident.py").write_text("raise SystemExit('edited')\n")
        slurm.command("scancel", blocker)
        assert controller.wait(120) == 0, (work / "controller.out").read_text()
    assert not stepping(work / "outputs" / "s") and ended_states(work / "outputs" / "s") == {"completed": 1}
    assert len(list((work / "outputs" / "s" / "code").glob("[!.]*"))) == 1


def test_job_names_are_of_one_sweep_alone(tmp_path: Path) -> None:
    names = {job_name(tmp_path / place / "jobs") for place in ("a/s", "b/s", "a/s t", "a/s_t")}
    assert len(names) == 4 and all(name.replace("-", "").replace("_", "").isalnum() for name in names)


def test_a_snapshot_is_taken_once(tmp_path: Path) -> None:
    first = code_snapshot(tmp_path)
    assert code_snapshot(tmp_path) == first and (first / "isaerft_sweep" / "trial" / "runner.py").is_file()
    found = subprocess.run(["find", str(first), "-name", "__pycache__"], capture_output=True, text=True, check=True)
    assert not found.stdout
