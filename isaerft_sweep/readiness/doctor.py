"""``isaerft-sweep doctor``: checks whether the site is ready for a sweep. Every finding that is not good has a remedy."""

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
from isaerft_sweep.dispatch.job import Job
from isaerft_sweep.dispatch.slurm.cluster import SlurmCluster, cluster_of, read_cluster, run_slurm_command
from isaerft_sweep.dispatch.slurm.sbatch_flags import sbatch_parameters
from isaerft_sweep.errors import FolderError, LaunchError
from isaerft_sweep.journal.atomic_files import read_json, write_json
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.readiness.probe import ANSWER, BAD, GOOD, LOCKED, MADE_BEFORE, WARNING, Finding, ProbeJob
from isaerft_sweep.spec_fields import canonical_json, to_dict
from isaerft_sweep.specs import Experiment

MARKS = {GOOD: ("ok     ", "green"), WARNING: ("warning", "yellow"), BAD: ("BAD    ", "red")}
"""The prefix of a line by state, and its colour."""
SKEW_S = 30.0
SHORT_GRACE_S = 15


def diagnose(console: Console, experiment: Experiment, wait_s: float) -> int:
    """Print all findings; returns exit code 1 when one is bad."""
    findings = []
    if experiment.launcher.kind == "slurm":
        findings += show(console, site_findings(experiment))
    if not any(finding.state == BAD for finding in findings):
        console.print(
            f"waiting for a job of launcher={experiment.launcher.kind} to check the machine where trials run", style="dim"
        )
        findings += show(console, job_findings(experiment, wait_s))
    bad = sum(finding.state == BAD for finding in findings)
    console.print(f"{len(findings)} things checked, {bad} bad.")
    return 1 if bad else 0


def show(console: Console, findings: list[Finding]) -> list[Finding]:
    """Print ``findings`` and return them."""
    for finding in findings:
        console.print(Text.assemble(MARKS[finding.state], "  ", (finding.what, "bold"), ": "), end="")
        console.print(finding.text, soft_wrap=True, markup=False, highlight=False)
        if finding.state != GOOD and finding.remedy:
            console.print(f"         {finding.remedy}", soft_wrap=True, markup=False, highlight=False)
    return findings


def site_findings(experiment: Experiment) -> list[Finding]:
    """Findings from the cluster's configuration."""
    try:
        cluster = cluster_of(experiment.launcher)
        site = read_cluster(cluster)
    except LaunchError as error:
        return [Finding("SLURM", BAD, str(error))]
    settings = site.settings
    name, version = settings.get("ClusterName", "?"), settings.get("SLURM_VERSION", "?")
    findings = [Finding("SLURM", GOOD, f"{name}, version {version}; partitions {', '.join(site.partitions)}")]
    try:
        requested = sbatch_parameters(experiment.launcher, site, "doctor")
    except LaunchError as error:
        return [*findings, Finding("launcher.slurm", BAD, str(error))]
    text = ", ".join(
        f"{key} {requested[key]}" for key in ("time", "gpus_per_node", "gres", "cpus_per_task", "mem") if key in requested
    )
    findings.append(Finding("launcher.slurm", GOOD, f"{text} (time in minutes)"))
    findings.append(preemption(settings, grace_s(str(requested.get("partition") or site.default_partition), cluster)))
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
        return Finding("preemption", GOOD, f"{kind}, {mode}: a job is suspended and resumes, which costs only time")
    text = f"{kind}, {mode}: a job gets SIGTERM and {grace} s to exit"
    if grace >= SHORT_GRACE_S:
        return Finding("preemption", GOOD, text)
    remedy = (
        "A preempted trial repeats the steps since its last checkpoint. Write checkpoints more often "
        "(orpo.checkpoint_every_min=1), or use a partition or qos that is not preempted."
    )
    return Finding("preemption", WARNING, text, remedy)


def grace_s(partition: str, cluster: str | None = None) -> int:
    """The partition's GraceTime in seconds; 0 when unknown."""
    try:
        output = run_slurm_command("scontrol", "--oneliner", "show", "partition", partition.split(",")[0], cluster=cluster)
    except LaunchError:
        return 0
    return next((int(setting.split("=")[1]) for setting in output.split() if setting.startswith("GraceTime=")), 0)


def requeue(settings: Mapping[str, str]) -> Finding:
    """How an interrupted trial restarts."""
    state = "on" if settings.get("JobRequeue") == "1" else "off"
    text = (
        f"not needed (JobRequeue is {state}): the controller restarts an interrupted trial in a new job; "
        f"a cancelled job has {settings.get('KillWait', '30 sec')} to exit"
    )
    return Finding("requeue", GOOD, text)


def arrays(site: SlurmCluster, experiment: Experiment) -> Finding:
    """How the workers fit into job arrays."""
    slots, size = experiment.launcher.slots or 1, site.array_size
    split = f", so {slots} workers are {-(-slots // size)} arrays" if slots > size else ""
    return Finding("arrays", GOOD, f"of at most {size} jobs{split}; MaxJobCount {site.settings.get('MaxJobCount', '?')}")


def accounting(settings: Mapping[str, str]) -> Finding:
    """Whether sacct answers: it tells how a job ended when squeue no longer does."""
    try:
        run_slurm_command("sacct", "--noheader", "-X", "-S", "now-1minutes")
    except LaunchError:
        text = "none: how a job ended is known for MinJobAge " + settings.get("MinJobAge", "?")
        return Finding("sacct", WARNING, text, "Harmless: outcomes are read from the trials' folders.")
    return Finding("sacct", GOOD, "answers")


def job_findings(experiment: Experiment, wait_s: float) -> list[Finding]:
    """Findings of a job of the launcher where it runs, and the skew between the two machines' clocks."""
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
            return _run_probe(experiment, folder, ahead_s, wait_s)
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)


def _run_probe(experiment: Experiment, folder: SweepFolder, ahead_s: float, wait_s: float) -> list[Finding]:
    dispatcher = make_inner_dispatcher(experiment.launcher, folder)
    # dispatchers accept any such callable; their type hint is the usual one
    probe = cast(Job, ProbeJob(str(folder.path), canonical_json(to_dict(experiment)), dispatcher.threads))
    job = dispatcher.submit(probe)
    deadline = time.monotonic() + wait_s
    try:
        while dispatcher.alive([job])[0]:
            if time.monotonic() > deadline:
                text = f"it has not run within {wait_s:g} s"
                return [Finding("job", BAD, text, "Check why it waits: squeue --me. Or wait longer: --wait SECONDS.")]
            time.sleep(min(1.0, experiment.launcher.poll_s))
    finally:
        dispatcher.kill([job])
    answer = read_json(folder.path / ANSWER)
    if answer is None:
        text = f"it ended without an answer. {dispatcher.job_exit(job).reason}\n{dispatcher.log_tail(job, 20)}"
        return [Finding("job", BAD, text, "It needs the same Python environment and output folder as this machine.")]
    findings = [Finding(**finding) for finding in answer["findings"]]
    return [*findings, clocks(answer["ahead_of_disk_s"] - ahead_s)]


def clocks(skew_s: float) -> Finding:
    """Whether the clocks agree: the controller compares heartbeats with its own clock."""
    text = f"{abs(skew_s):.1f} s between this machine's and the job's"
    if abs(skew_s) < SKEW_S:
        return Finding("clocks", GOOD, text)
    return Finding(
        "clocks", BAD, text, "Have the nodes' clocks synchronised (chrony); until then increase launcher.heartbeat_s."
    )
