"""``isaerft-sweep doctor``: is this place ready for a sweep? Each finding that is not good comes with its remedy."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.text import Text

from isaerft_sweep.controller.build import make_inner_dispatcher
from isaerft_sweep.dispatch.cluster import SlurmCluster, cluster_of, read_cluster, run_slurm_command
from isaerft_sweep.dispatch.job import Job
from isaerft_sweep.dispatch.sbatch_flags import sbatch_parameters
from isaerft_sweep.errors import FolderError, LaunchError
from isaerft_sweep.journal.atomic_files import read_json, write_json
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.readiness.probe import ANSWER, BAD, GOOD, LOCKED, MADE_BEFORE, WARNING, Finding, ProbeJob
from isaerft_sweep.spec_fields import canonical_json, to_dict
from isaerft_sweep.specs import Experiment

MARKS = {GOOD: ("ok     ", "green"), WARNING: ("warning", "yellow"), BAD: ("BAD    ", "red")}
"""What a line begins with, and its colour."""
SKEW_S = 30.0
SHORT_GRACE_S = 15


def diagnose(console: Console, experiment: Experiment, wait_s: float) -> int:
    """Print all findings; 1 when one of them is bad."""
    findings = []
    if experiment.launcher.kind == "slurm":
        findings += show(console, site_findings(experiment))
    if not any(found.state == BAD for found in findings):
        console.print(f"waiting for a job of launcher={experiment.launcher.kind} to look at the place itself", style="dim")
        findings += show(console, job_findings(experiment, wait_s))
    bad = sum(found.state == BAD for found in findings)
    console.print(f"{len(findings)} things checked, {bad} bad.")
    return 1 if bad else 0


def show(console: Console, findings: list[Finding]) -> list[Finding]:
    """Print findings as they come."""
    for found in findings:
        console.print(Text.assemble(MARKS[found.state], "  ", (found.what, "bold"), ": "), end="")
        console.print(found.words, soft_wrap=True, markup=False, highlight=False)
        if found.state != GOOD and found.remedy:
            console.print(f"         {found.remedy}", soft_wrap=True, markup=False, highlight=False)
    return findings


def site_findings(experiment: Experiment) -> list[Finding]:
    """What the cluster says of itself."""
    try:
        cluster = cluster_of(experiment.launcher)
        site = read_cluster(cluster)
    except LaunchError as error:
        return [Finding("SLURM", BAD, str(error))]
    settings = site.settings
    name, version = settings.get("ClusterName", "?"), settings.get("SLURM_VERSION", "?")
    findings = [Finding("SLURM", GOOD, f"{name}, version {version}; partitions {', '.join(site.partitions)}")]
    try:
        asked = sbatch_parameters(experiment.launcher, site, "doctor")
    except LaunchError as error:
        return [*findings, Finding("launcher.slurm", BAD, str(error))]
    words = ", ".join(
        f"{key} {asked[key]}" for key in ("time", "gpus_per_node", "gres", "cpus_per_task", "mem") if key in asked
    )
    findings.append(Finding("launcher.slurm", GOOD, f"{words} (time in minutes)"))
    findings.append(preemption(settings, grace_s(str(asked.get("partition") or site.default_partition), cluster)))
    findings.append(requeue(settings))
    findings.append(arrays(site, experiment))
    findings.append(accounting(settings))
    return findings


def preemption(settings: Mapping[str, str], grace: int) -> Finding:
    """How a job learns that it will be preempted."""
    kind, mode = settings.get("PreemptType", "(null)"), settings.get("PreemptMode", "OFF")
    if kind in ("(null)", "preempt/none") or mode == "OFF":
        return Finding("preemption", GOOD, "off")
    if mode.startswith("SUSPEND"):
        return Finding(
            "preemption", GOOD, f"{kind}, {mode}: a job is held still and goes on, which costs it nothing but time"
        )
    words = f"{kind}, {mode}: a job gets SIGTERM and {grace} s to end in"
    if grace >= SHORT_GRACE_S:
        return Finding("preemption", GOOD, words)
    remedy = (
        "What a preempted trial has done since its last checkpoint is done again. Write them more often "
        "(orpo.checkpoint_every_min=1), or use a partition or qos that is not preempted."
    )
    return Finding("preemption", WARNING, words, remedy)


def grace_s(partition: str, cluster: str | None = None) -> int:
    """The partition's GraceTime."""
    try:
        text = run_slurm_command("scontrol", "--oneliner", "show", "partition", partition.split(",")[0], cluster=cluster)
    except LaunchError:
        return 0
    return next((int(word.split("=")[1]) for word in text.split() if word.startswith("GraceTime=")), 0)


def requeue(settings: Mapping[str, str]) -> Finding:
    """Who starts an interrupted trial again."""
    site = "on" if settings.get("JobRequeue") == "1" else "off"
    words = (
        f"not needed (JobRequeue is {site}): the controller starts an interrupted trial again, in a new job; "
        f"a cancelled job has {settings.get('KillWait', '30 sec')} to end in"
    )
    return Finding("requeue", GOOD, words)


def arrays(site: SlurmCluster, experiment: Experiment) -> Finding:
    """Whether the workers fit into arrays."""
    slots, size = experiment.launcher.slots or 1, site.array_size
    split = f", so {slots} workers are {-(-slots // size)} arrays" if slots > size else ""
    return Finding("arrays", GOOD, f"of at most {size} jobs{split}; MaxJobCount {site.settings.get('MaxJobCount', '?')}")


def accounting(settings: Mapping[str, str]) -> Finding:
    """sacct, the second opinion."""
    try:
        run_slurm_command("sacct", "--noheader", "-X", "-S", "now-1minutes")
    except LaunchError:
        words = "none: how a job ended is known for MinJobAge " + settings.get("MinJobAge", "?")
        return Finding("sacct", WARNING, words, "Nothing is lost by it: outcomes are read from the trials' own folders.")
    return Finding("sacct", GOOD, "answers")


def job_findings(experiment: Experiment, wait_s: float) -> list[Finding]:
    """What a job of the launcher finds where it runs, and the time between the two machines' clocks."""
    output = Path(experiment.output).expanduser().absolute()
    try:
        output.mkdir(parents=True, exist_ok=True)
        folder = SweepFolder(Path(tempfile.mkdtemp(dir=output, prefix=".doctor-")))
        write_json(folder.path / MADE_BEFORE, {})
        ahead_s = time.time() - (folder.path / MADE_BEFORE).stat().st_mtime
    except OSError as error:
        raise FolderError(
            f"the output folder {output} cannot be written ({error.strerror}). Choose another: output=PATH."
        ) from error
    try:
        with (folder.path / LOCKED).open("a", encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            return _ask_job(experiment, folder, ahead_s, wait_s)
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)


def _ask_job(experiment: Experiment, folder: SweepFolder, ahead_s: float, wait_s: float) -> list[Finding]:
    dispatcher = make_inner_dispatcher(experiment.launcher, folder)
    # dispatchers take any call of this form; their own are named for people
    probe = cast(Job, ProbeJob(str(folder.path), canonical_json(to_dict(experiment)), dispatcher.threads))
    job = dispatcher.submit(probe)
    end = time.monotonic() + wait_s
    try:
        while dispatcher.alive([job])[0]:
            if time.monotonic() > end:
                words = f"it has not run within {wait_s:g} s"
                return [Finding("job", BAD, words, "See why it waits: squeue --me. Or wait longer: --wait SECONDS.")]
            time.sleep(min(1.0, experiment.launcher.poll_s))
    finally:
        dispatcher.kill([job])
    answer = read_json(folder.path / ANSWER)
    if answer is None:
        words = f"it ended without an answer. {dispatcher.job_exit(job).words}\n{dispatcher.log_tail(job, 20)}"
        return [Finding("job", BAD, words, "It needs the same Python environment and output folder as this machine.")]
    findings = [Finding(**found) for found in answer["findings"]]
    return [*findings, clocks(answer["ahead_of_disk_s"] - ahead_s)]


def clocks(skew_s: float) -> Finding:
    """The controller judges by its own clock whether a worker is silent."""
    words = f"{abs(skew_s):.1f} s between this machine's and the job's"
    if abs(skew_s) < SKEW_S:
        return Finding("clocks", GOOD, words)
    return Finding(
        "clocks", BAD, words, "Ask for the nodes' time to be set (chrony); until then a larger launcher.heartbeat_s."
    )
