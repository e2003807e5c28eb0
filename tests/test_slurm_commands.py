"""SLURM's commands as shells and sites change them: what a variable, a banner or another cluster adds hides no job."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from helpers.slurm_bed import Bed
from helpers.slurm_jobs import (
    GPU,
    Note,
    Site,
    parameters,
)
from helpers.waiting import wait_for
from hypothesis import example, given
from hypothesis import strategies as st

from isaerft_sweep.dispatch.base import SchedulerUnavailable
from isaerft_sweep.dispatch.slurm import cluster
from isaerft_sweep.dispatch.slurm import dispatcher as slurm
from isaerft_sweep.dispatch.slurm.cluster import (
    SLURM_TERMINAL,
    parse_accounting,
    parse_kind,
    parse_queue,
    parse_settings,
    state_of,
)
from isaerft_sweep.dispatch.slurm.dispatcher import SlurmDispatcher
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.journal.job_refs import SlurmJob
from isaerft_sweep.specs import LauncherSpec

HOSTILE = {
    "SQUEUE_STATES": "CONFIGURING",
    "SQUEUE_PARTITION": "urgent",
    "SQUEUE_USERS": "nobody",
    "SQUEUE_FORMAT": "%A",
    "SINFO_PARTITION": "urgent",
    "SINFO_FORMAT": "%A",
    "SACCT_FORMAT": "JobID",
    "SACCT_FEDERATION": "1",
    "SCONTROL_FEDERATION": "1",
    "SCANCEL_STATE": "SUSPENDED",
    "SCANCEL_INTERACTIVE": "",
    "SCANCEL_BATCH": "",
    "SLURM_TIME_FORMAT": "relative",
    "SLURM_BITSTR_LEN": "3",
}


def two_jobs(tmp_path: Path, **slurm: object) -> tuple[SlurmDispatcher, list[SlurmJob]]:
    dispatcher = SlurmDispatcher(LauncherSpec(kind="slurm", slots=2, slurm=slurm), tmp_path / "s" / "jobs")
    return dispatcher, dispatcher.submit_all([Note("a"), Note("b")])  # type: ignore[list-item]


def test_every_query_asks_for_all_and_no_variable_reaches_it(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_CONF", "/kept")
    dispatcher, refs = two_jobs(tmp_path)
    site.says("squeue", "7_0|PENDING|Resources|\n7_1|RUNNING|None|n1\n")
    assert dispatcher.alive(refs) == [True, True]
    dispatcher.kill(refs)
    said = site.calls.read_text()
    assert not [name for name in HOSTILE if f"{name}=" in said] and "SLURM_CONF=/kept" in said
    for command in ("squeue", "sinfo", "scontrol"):
        assert site.lines(command) and all(" --all " in line for line in site.lines(command))


def test_a_job_that_accounting_calls_pending_or_running_lives(site: Site, tmp_path: Path) -> None:
    dispatcher, refs = two_jobs(tmp_path)
    site.says("sacct", "7_[0-1%2]|PENDING|None assigned\n")
    assert dispatcher.alive(refs) == [True, True], "a site's squeue shows nothing of them"
    site.says("sacct", "7_0|RUNNING|n1\n7_1|NODE_FAIL|n2\n")
    assert dispatcher.alive(refs) == [True, False]
    assert dispatcher.job_exit(refs[1]).reason == "SLURM: NODE_FAIL (n2)"
    site.says("sacct", "7_0|COMPLETED|n1\n7_1|NODE_FAIL|n2\n")
    assert dispatcher.alive(refs) == [False, False]
    site.says("sacct", "")
    assert dispatcher.alive(refs) == [False, False], "what has ended stays ended"


def test_a_job_that_is_completing_for_ever_is_over(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher, refs = two_jobs(tmp_path)
    site.says("squeue", "7_0|COMPLETING|None|n1\n7_1|RUNNING|None|n2\n")
    assert dispatcher.alive(refs) == [True, True]
    now = time.monotonic()
    monkeypatch.setattr(slurm.time, "monotonic", lambda: now + slurm.COMPLETING_S + 1)
    assert dispatcher.alive(refs) == [False, True]
    assert (
        dispatcher.job_exit(refs[0]).reason == "SLURM: COMPLETING (n1)" and dispatcher.job_exit(refs[0]).cause == "scheduler"
    )
    site.says("sacct", "7_0|OUT_OF_MEMORY|n1\n")
    assert dispatcher.alive(refs) == [False, True]
    assert dispatcher.job_exit(refs[0]).reason == "SLURM: OUT_OF_MEMORY (n1)"


def test_another_cluster_is_named_to_every_command(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CLUSTERS", "far")
    dispatcher, refs = two_jobs(tmp_path)
    site.says("squeue", "CLUSTER: far\n7_0|RUNNING|None|n1\n7_1|PENDING|Priority|\n8_0|RUNNING|None|n1\n")
    assert [ref.cluster for ref in refs] == ["far", "far"] and dispatcher.alive(refs) == [True, True]
    dispatcher.kill(refs)
    for command in ("squeue", "sinfo", "scancel"):
        assert all(" --clusters=far" in line for line in site.lines(command)), site.lines(command)
    assert "scancel --clusters=far 8_0" in site.lines("scancel"), "what nobody remembers is ended there"
    assert "#SBATCH --clusters=far" in next((tmp_path / "s" / "jobs").glob("*_submission.sh")).read_text()
    # the same sweep goes on with the local cluster: each job is looked for where it is
    monkeypatch.delenv("SLURM_CLUSTERS")
    later = SlurmDispatcher(LauncherSpec(kind="slurm"), tmp_path / "s" / "jobs")
    site.calls.write_text("")
    assert later.alive(refs) == [True, True]
    assert [("--clusters=far" in line) for line in site.lines("squeue")] == [False, True]


@pytest.mark.parametrize("name", ["a,b", "all"])
def test_several_clusters_are_refused(name: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match=rf"launcher.slurm.clusters must name one cluster.* but got '{name}'"):
        two_jobs(tmp_path, clusters=name)
    monkeypatch.setenv("SLURM_CLUSTERS", name)
    with pytest.raises(LaunchError, match="SLURM_CLUSTERS must name one cluster"):
        two_jobs(tmp_path)
    monkeypatch.setenv("SLURM_CLUSTERS", "bed")
    assert two_jobs(tmp_path)[1][0].cluster is None, "this machine's own needs no name"


@pytest.mark.slow
def test_a_hostile_shell_and_a_real_cluster(slurm: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**HOSTILE, "SLURM_CLUSTERS": "bed"}.items():
        monkeypatch.setenv(name, value)
    dispatcher, refs = two_jobs(tmp_path, setup="sleep 600", gpus_per_node=0)
    assert dispatcher.alive(refs) == [True, True]
    wait_for(lambda: dispatcher.alive(refs) and not any(map(dispatcher.queued, refs)))
    dispatcher.kill(refs)
    wait_for(lambda: not any(dispatcher.alive(refs)), timeout_s=60)


@pytest.mark.slow
def test_a_named_cluster_that_is_real(slurm: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bed's own one, taken for another: every command is sent there by name."""
    monkeypatch.setattr("isaerft_sweep.dispatch.slurm.dispatcher.cluster_of", lambda _spec: "bed")
    dispatcher, refs = two_jobs(tmp_path, hold=True)
    assert dispatcher.alive(refs) == [True, True] and [ref.cluster for ref in refs] == ["bed", "bed"]
    dispatcher.kill(refs)
    wait_for(lambda: not any(dispatcher.alive(refs)), timeout_s=60)
    assert dispatcher.job_exit(refs[0]).reason.startswith("SLURM: CANCELLED")


BANNERS = (
    "",
    "CLUSTER: bed",
    "** maintenance | Monday | 8:00 **",
    "slurm_load: warning",
    "|||",
    "a|b|c|d|e|f|g",
    "7",
    "é|☃",
)
LIVING = ("PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "STAGE_OUT", "RESIZING", "NEW_STATE")
REASONS = st.sampled_from(["None", "Resources", "(ReqNodeNotAvail, UnavailableNodes:n1)", "a|b", "", "Priority"])
JOBS = st.dictionaries(st.integers(0, 9), st.sampled_from([*LIVING, *sorted(SLURM_TERMINAL)]), min_size=1)


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, dict[int, str]]:
    """What squeue or sacct may print about an array's tasks, with the truth: in any order, with other lines, and cut short."""
    jobs = draw(JOBS)
    separator = draw(st.sampled_from(["|", " | "]))
    lines = [separator.join([f"7_{task}", state, draw(REASONS), "n1"]) for task, state in jobs.items()]
    lines += draw(st.lists(st.sampled_from(BANNERS), max_size=3))
    lines += [f"6_0|{draw(st.sampled_from(LIVING))}|None|n2"] * draw(st.integers(0, 1))
    text = "\n".join(draw(st.permutations(lines))) + draw(st.sampled_from(["\n", ""]))
    return text[: len(text) - draw(st.sampled_from([0, 0, 1, 5, 20]))], jobs


@given(answers())
@example(("7_0|RUNNING|None|n1\n7_1|PEN", {0: "RUNNING", 1: "PENDING"}))
def test_a_job_that_is_said_to_wait_or_run_is_never_dead(answer: tuple[str, dict[int, str]]) -> None:
    text, jobs = answer
    for parse in (parse_queue, parse_accounting):
        try:
            states = parse(text)
        except SchedulerUnavailable:
            continue  # nothing is known, so nothing has ended
        for task, state in jobs.items():
            said = [line for line in text.splitlines() if line.replace(" ", "").startswith(f"7_{task}|{state}")]
            if said and state not in SLURM_TERMINAL:
                assert state_of(states, f"7_{task}")[0] not in {"", *SLURM_TERMINAL}
            if state not in SLURM_TERMINAL:
                assert state_of(states, f"7_{task}")[0] not in SLURM_TERMINAL


@given(st.lists(st.tuples(answers(), answers()), min_size=1, max_size=3))
def test_what_is_said_over_several_polls(polls: list[tuple[tuple[str, dict[int, str]], tuple[str, dict[int, str]]]]) -> None:
    """squeue and accounting, each with other lines and cut short, in turn: the words of both reach the dispatcher's verdict."""
    queue, jobs = slurm._Queue(None, {"s"}), {f"7_{task}" for task in range(10)}
    queue.known |= jobs | {"6_0"}
    for (shown, _), (remembered, _) in polls:
        said = {"squeue": shown, "sacct": remembered}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cluster, "run_slurm_command", lambda command, *_, said=said, **__: said[command])
            patch.setattr(slurm, "cancel_jobs", lambda *args, **_: pytest.fail(f"ended {args}"))
            answered = queue.refresh(jobs)
        for job in jobs if answered else ():
            words = [w for line in shown.splitlines() if (w := line.replace(" ", "").split("|"))[0] == job and len(w) > 1]
            told = [
                w for line in remembered.splitlines() if (w := line.replace(" ", "").split("|"))[0] == job and len(w) > 1
            ]
            if any(w[1] in LIVING for w in words) or (not words and any(w[1] in LIVING for w in told)):
                assert queue.is_alive(job) or queue.accounted.get(job, ("",))[0] in SLURM_TERMINAL
            if words and any(w[1] in LIVING for w in words):
                assert queue.is_alive(job)


@st.composite
def clusters(draw: st.DrawFn) -> dict[str, str]:
    """What sinfo, scontrol and sacctmgr may print: nearly valid."""
    field = st.sampled_from(
        ["main", "main*", "4", "128+", "8000", "infinite", "1-00:00:00", "5:00", "0:30", "n/a", "(null)", "a100,nv|link", "gpu:2", "",
         "gpu:a100:4(S:0-1),tmp:2T", "gpu:a:b:", "é", "-1", "1e9", "*", "CLUSTER: far"]
    )  # fmt: skip
    good = "main|main*|4|8000|infinite|big|gpu:fake:2"
    lines = draw(
        st.lists(st.lists(field, min_size=1, max_size=9).map("|".join) | st.sampled_from([good, *BANNERS]), max_size=4)
    )
    settings = draw(st.lists(st.sampled_from(["MaxArraySize = x", "MaxArraySize=0", "MaxArraySize = 1001", "a = b = c", "=", "ClusterName = bed",
                                              "AccountingStorageEnforce = associations,qos", *BANNERS]), max_size=4))  # fmt: skip
    users = draw(st.lists(st.sampled_from(["lab|normal,few", "lab|", "|", "a|b|c", *BANNERS]), max_size=3))
    return {"sinfo": "\n".join(lines), "scontrol": "\n".join(settings), "sacctmgr": "\n".join(users)}


@given(
    clusters(), st.sampled_from([{}, {"partition": "main"}, {"gres": "gpu:1"}, {"constraint": "big"}, {"account": "lab"}])
)
def test_a_cluster_is_read_or_refused_in_one_line(said: dict[str, str], flags: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "run_slurm_command", lambda command, *_, **__: said[command])
        try:
            site = cluster.read_cluster()
            found = parameters(site, **flags)
        except LaunchError as error:
            assert "\n" not in str(error)
        else:
            assert site.array_size >= 1 and found["time"] >= 1 and found["cpus_per_task"] >= 1


@given(st.sets(st.integers(0, 40), min_size=1), st.sampled_from(["", "%4"]), st.booleans())
def test_many_tasks_in_one_line(tasks: set[int], most: str, cut: bool) -> None:
    listed = ",".join(map(str, sorted(tasks))) + (",..." if cut else "")
    for line in (f"7_[{listed}{most}]|PENDING|Resources|", f"7_[{min(tasks)}-{max(tasks)}{most}]|PENDING|Resources|"):
        states = parse_queue(f"{line}\n7_50|COMPLETED|None|n1\n")
        assert {state_of(states, f"7_{task}")[0] for task in tasks} == {"PENDING"}
        assert state_of(states, "7_50")[0] == "COMPLETED"
    assert (state_of(parse_queue(f"7_[{listed}]|PENDING|x|\n"), "7_99")[0] == "PENDING") == cut


@given(st.text(alphabet="|*:,()[]+0123456789abcinfty%- \n", max_size=60))
def test_no_text_is_a_traceback(text: str) -> None:
    for line in text.splitlines():
        parse_kind(line)
    parse_accounting(text)
    parse_settings(text)
    cluster.parse_gres(text)
    cluster.minutes(text)
    try:
        parse_queue(text)
    except SchedulerUnavailable as error:
        assert "breaks off" in str(error)


def test_lines_of_sinfo_among_others(site: Site, tmp_path: Path) -> None:
    site.says(
        "sinfo", "Welcome | to | the | cluster\nCLUSTER: bed\ngpu|gpu*|64+|512000|2-00:00:00|a100|x,nvlink|gpu:a100:4\n\n"
    )
    kinds = cluster.read_cluster().kinds
    assert [(kind.partition, kind.features, kind.gpus) for kind in kinds] == [("gpu", ("a100|x", "nvlink"), 4)]
    site.says("sinfo", "Welcome\n")
    with pytest.raises(LaunchError, match=r"sinfo must list the cluster's nodes.* but said 'Welcome'"):
        cluster.read_cluster()
    site.says("scontrol", "a banner with = in it\nMaxArraySize = many\n")
    site.says("sinfo", "main|main|4|8000|infinite|(null)|(null)\n")
    assert cluster.read_cluster().array_size == 1001
    (site.folder / "sinfo").write_bytes(b"#!/bin/bash\nprintf 'm\\xe4in|main*|4|8000|infinite|(null)|(null)\\n'\n")
    assert cluster.read_cluster().kinds[0].cpus == 4, "in another encoding"


@pytest.mark.parametrize(
    ("given_as", "asked"),
    [
        ("module load cuda", ["module load cuda"]),
        ("module load cuda\nconda activate env\n", ["module load cuda", "conda activate env"]),
        (["module load cuda"], ["module load cuda"]),
    ],
)
def test_setup_lines(given_as: object, asked: list[str]) -> None:
    assert parameters(setup=given_as)["setup"] == asked
    assert parameters(teardown=given_as)["teardown"] == asked


@pytest.mark.parametrize(
    ("flags", "gpus"),
    [
        ({"gres": "lscratch:100"}, 1),
        ({"gres": "gpu:a100:1,tmpfs:200G"}, None),
        ({"gres": "tmpfs:1T,gres/gpu:2"}, None),
        ({"gres": ["gpu:1", "lscratch:1"]}, None),
        ({"gres": "none"}, None),
        ({"tres_per_node": "gres/gpu:1"}, None),
        ({"gpus_per_node": "a100:2"}, "a100:2"),
        ({"account": "LAB", "qos": "Normal"}, 1),
        ({}, 1),
    ],
)
def test_gpus_that_are_asked_for(flags: dict[str, object], gpus: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isaerft_sweep.dispatch.slurm.sbatch_flags.sbatch_flags", lambda: ["tres_per_node"])
    node = GPU.gres | cluster.parse_gres("lscratch:500,tmpfs:2T")
    import dataclasses

    from helpers.slurm_jobs import SITE

    site = dataclasses.replace(SITE, kinds=(dataclasses.replace(GPU, gres=node),))
    assert parameters(site, **flags).get("gpus_per_node") == gpus


@given(st.integers(1, 10**6), st.sampled_from(" kmgtpKMGTP"), st.booleans())
def test_counts_of_resources(count: int, letter: str, typed: bool) -> None:
    name = "tmpfs:fast" if typed else "tmpfs"
    asked = f"{name}:{count}{letter.strip()}"
    assert cluster.gres_request(asked) == (name, count * 1024 ** " kmgtp".index(letter.lower()))
    assert cluster.parse_gres(f"{asked}(S:0-1)")[name] == cluster.gres_request(asked)[1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"mem_gb": "32G"}, "mem_gb must be a number of gigabytes (mem_gb=32) but got '32G'"),
        ({"mem_gb": 0}, "mem_gb must be a number of gigabytes"),
        ({"mem_gb": "nan"}, "mem_gb must be a number of gigabytes"),
        ({"mem_gb": True}, "mem_gb must be a number of gigabytes"),
        ({"cpus_per_task": "four"}, "cpus_per_task must be a whole number of at least 1 but got 'four'"),
        ({"cpus_per_task": 0}, "cpus_per_task must be a whole number of at least 1 but got '0'"),
        ({"cpus_per_task": 1.5}, "cpus_per_task must be a whole number of at least 1 but got '1.5'"),
        ({"array_parallelism": "all"}, "array_parallelism must be a whole number of at least 1 but got 'all'"),
        ({"gpus_per_node": "four"}, "gpus_per_node must name GPUs of the nodes but got four"),
        ({"gres": "tmpfs:200G"}, "gres names an unknown resource: 'tmpfs'"),
        ({"parsable": True}, "launcher.slurm.parsable must not be set here"),
        ({"test_only": True}, "launcher.slurm.test_only must not be set here"),
        ({"wait": True}, "launcher.slurm.wait must not be set here"),
        ({"time_min": 5}, "launcher.slurm.time_min must not be set here"),
        ({"additional_parameters": {"parsable": True}}, "launcher.slurm.parsable must not be set here"),
        (
            {"additional_parameters": "parsable"},
            "additional_parameters must be flags of sbatch with their values but got 'parsable'",
        ),
        ({"setup": [{"module": "cuda"}]}, "setup must be lines of a script"),
        ({"comment": {"a": 1}}, "comment must be a flag's value but got {'a': 1}"),
    ],
)
def test_values_that_are_no_values(flags: dict[str, object], said: str) -> None:
    with pytest.raises(LaunchError) as error:
        parameters(**flags)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_flag_that_is_switched_off_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isaerft_sweep.dispatch.slurm.sbatch_flags.sbatch_flags", lambda: ["hold"])
    found = parameters(exclusive=False, hold=False)
    assert "exclusive" not in found and "hold" not in found["additional_parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["50% off", "100%", "it's %u", "%%x"])
def test_a_percent_sign_in_the_path(name: str, slurm: Bed, tmp_path: Path) -> None:
    dispatcher = SlurmDispatcher(LauncherSpec(kind="slurm"), tmp_path / name / "jobs")
    refs = dispatcher.submit_all([Note(str(tmp_path / "mark"))])  # type: ignore[list-item]
    wait_for(lambda: not any(dispatcher.alive(refs)))
    assert (tmp_path / "mark").exists() and "completed successfully" in dispatcher.log_tail(refs[0])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [name]


@pytest.mark.parametrize("name", ["a%j", "b%A", "c%ab", "d%t", "e\\f", "g\nh"])
def test_a_path_that_slurm_would_read_otherwise(name: str, site: Site, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"path must not contain .* Choose another: output=PATH"):
        SlurmDispatcher(LauncherSpec(kind="slurm"), tmp_path / name / "jobs")
    assert not (tmp_path / name).exists()
