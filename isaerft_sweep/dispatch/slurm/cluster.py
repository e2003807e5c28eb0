"""Runs SLURM's commands and parses their output: settings, partitions, nodes, accounts, and the states of jobs."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from isaerft_sweep.dispatch.base import SchedulerUnavailable
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.specs import LauncherSpec

ANSWER_S = 60
"""How long one of SLURM's commands may take before it counts as not answering."""
SINFO = "%R|%P|%c|%m|%l|%f|%G"
SQUEUE = "%i|%T|%r|%N"
SACCT = "JobID,State,NodeList"
USER_JOB_FIELDS = ("%F", "%T", "%Z", "%o")
"""squeue's codes for the array id, the state, the folder of submission, and the script with its arguments."""
SEPARATOR = "\x1f"
"""Separates fields that may hold any character that people type."""
SLURM_TERMINAL = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED",
    "REVOKED", "LAUNCH_FAILED",
}  # fmt: skip
"""States of a job that has ended. In any other state, also an unknown one, the job counts as alive."""
COMPLETING_S = 90.0
"""How long a job may take to end after its processes got the signal: SLURM itself kills them after half a minute."""
SETTING = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SQUEUE_", "SINFO_", "SACCT_", "SCONTROL_", "SCANCEL_", "SALLOC_")
"""Prefixes of the variables that change what SLURM's commands show and do."""
PLACE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_SOCKET")
"""Those that the commands may need to find their cluster or to authenticate."""
HIDING = ("squeue", "sinfo", "scontrol")
"""Commands that leave out hidden partitions, and jobs in them, without ``--all``."""
JOB_ID = re.compile(r"(\d+)(?:_(?:(\d+)|\[([^]]*)\]?))?")
"""``12``, ``12_3``, and ``12_[0-3,5%2]`` for many tasks of an array in one line."""
REST = "*"
"""Stands for the array tasks that a line leaves out: ``12_[0-3,...]``."""


def run_slurm_command(*command: str, cluster: str | None = None) -> str:
    """Run one of SLURM's commands; its output. ``cluster``: another one than this machine's.

    Raises SchedulerUnavailable when it does not answer, LaunchError when the command does not exist.
    """
    program, *arguments = command
    arguments = [*(["--all"] if program in HIDING else []), *to_cluster(cluster), *arguments]
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, encoding="utf-8", errors="replace", timeout=ANSWER_S, check=False,
            env=commands_environment(),
        )  # fmt: skip
    except FileNotFoundError as error:
        raise LaunchError(
            f"launcher=slurm needs SLURM's commands on this machine, but there is no '{program}'. Start it on a login "
            "node, or use launcher=local."
        ) from error
    except OSError as error:
        raise LaunchError(f"'{program}' cannot be run ({error.strerror}). Is it SLURM's own?") from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerUnavailable(
            f"'{program}' has not answered for {ANSWER_S} s. Is slurmctld up? See: scontrol ping"
        ) from error
    if done.returncode:
        message = " ".join(done.stderr.split())[-500:]
        if "configuration source" in message:
            raise LaunchError(
                f"launcher=slurm needs a machine that belongs to a SLURM cluster, but '{program}' finds no configuration of "
                "one. Start it on a login node, set SLURM_CONF, or use launcher=local."
            )
        raise SchedulerUnavailable(f"'{' '.join(command[:3])}' failed: {message.rstrip('.')}. See: scontrol ping")
    return done.stdout


def commands_environment() -> dict[str, str]:
    """The environment for SLURM's commands, without variables of a shell or a job that could hide a job from us."""
    return {key: value for key, value in os.environ.items() if key in PLACE or not key.startswith(SETTING)}


def to_cluster(cluster: str | None) -> list[str]:
    """The flag that sends a command to another cluster."""
    return [] if cluster is None else [f"--clusters={cluster}"]


@dataclass(frozen=True)
class NodeKind:
    """Identical nodes of one partition. ``max_min``: the partition's time limit in minutes, None without one."""

    partition: str
    default: bool
    cpus: int
    memory_mb: int
    max_min: int | None
    features: tuple[str, ...]
    gres: Mapping[str, int]
    """Counts per node, by name: ``gpu``, ``gpu:a100``."""

    @property
    def gpus(self) -> int:
        return self.gres.get("gpu", 0)


@dataclass(frozen=True)
class SlurmCluster:
    """One cluster. ``accounts`` and ``qos`` are the user's own; None when the cluster does not check them."""

    settings: Mapping[str, str]
    kinds: tuple[NodeKind, ...]
    accounts: tuple[str, ...] | None = None
    qos: tuple[str, ...] | None = None

    @cached_property
    def partitions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(kind.partition for kind in self.kinds))

    @property
    def default_partition(self) -> str | None:
        return next((kind.partition for kind in self.kinds if kind.default), None)

    @property
    def array_size(self) -> int:
        """How many jobs an array may have."""
        limit = self.settings.get("MaxArraySize", "")
        return max(1, int(limit)) if limit.isdecimal() else 1001

    def kinds_of(self, partition: str) -> list[NodeKind]:
        """The nodes of a partition, or of several (``a,b``)."""
        return [kind for kind in self.kinds if kind.partition in partition.split(",")]


def read_cluster(cluster: str | None = None) -> SlurmCluster:
    """The cluster that this machine belongs to, or another one.

    Raises LaunchError when this machine belongs to none, SchedulerUnavailable when it does not answer.
    """
    settings = parse_settings(run_slurm_command("scontrol", "show", "config", cluster=cluster))
    node_lines = run_slurm_command("sinfo", "--noheader", "--exact", f"--format={SINFO}", cluster=cluster)
    kinds = tuple(kind for line in node_lines.splitlines() if (kind := parse_kind(line)) is not None)
    if not kinds:
        raise LaunchError(
            f"sinfo must list the cluster's nodes, one kind a line ('{SINFO}'), but said {node_lines.strip()[:200]!r}. "
            "See: sinfo --all"
        )
    accounts, qos = _associations(settings)
    return SlurmCluster(settings, kinds, accounts, qos)


def cluster_of(spec: LauncherSpec) -> str | None:
    """The cluster that ``launcher.slurm.clusters`` or the user's shell selects; None: this machine's.

    Raises LaunchError when several are named.
    """
    name = _requested_cluster(spec, os.environ)
    own = parse_settings(run_slurm_command("scontrol", "show", "config")).get("ClusterName", "") if name else ""
    return None if name is None or name.lower() == own.lower() else name


def _requested_cluster(spec: LauncherSpec, environment: Mapping[str, str]) -> str | None:
    settings = {"launcher.slurm.clusters": spec.slurm.get("clusters") or spec.slurm.get("cluster")}
    if "SLURM_JOB_ID" not in environment:  # within a job the variables are that job's
        settings |= {key: environment.get(key) for key in ("SBATCH_CLUSTERS", "SLURM_CLUSTERS")}
    for key, value in settings.items():
        if value:
            name = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value).strip()
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name == "all":
                raise LaunchError(
                    f"{key} must name one cluster, since a sweep's jobs are in one queue, but got '{name}'. Give one: "
                    "launcher.slurm.clusters=NAME. See: sacctmgr list clusters"
                )
            return name
    return None


def parse_settings(text: str) -> dict[str, str]:
    """``scontrol show config`` as a mapping."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def parse_kind(line: str) -> NodeKind | None:
    """A line of sinfo in the format ``SINFO``; None for other lines (a banner, the cluster's name)."""
    fields = line.split("|")
    if len(fields) < 7:
        return None
    name, marked, cpus, memory, limit, *feature_parts, gres = fields  # a feature may hold a bar
    if not name.strip() or _number(cpus) is None or _number(memory) is None:
        return None
    feature_list = "|".join(feature_parts).strip()
    features = () if feature_list in ("(null)", "") else tuple(feature.strip() for feature in feature_list.split(","))
    return NodeKind(
        name.strip(), marked.strip().endswith("*"), _number(cpus) or 0, _number(memory) or 0, minutes(limit), features,
        parse_gres(gres),
    )  # fmt: skip


def _number(text: str) -> int | None:
    match = re.fullmatch(r"(\d+)\+?", text.strip(), re.ASCII)  # "128+" where nodes differ
    return int(match[1]) if match else None


def parse_gres(text: str) -> dict[str, int]:
    """``gpu:a100:4(S:0-1),disk:100,tmp:2T`` as counts of ``gpu``, ``gpu:a100``, ``disk`` and ``tmp``."""
    counts: dict[str, int] = {}
    for part in re.sub(r"\([^)]*\)", "", text).split(","):
        name, count = gres_request(part)
        if name:
            for each in {name.split(":")[0], name}:
                counts[each] = counts.get(each, 0) + count
    return counts


def gres_request(part: str) -> tuple[str, int]:
    """One entry of a list of generic resources, ``gpu:a100:2`` or ``tmpfs:200G``: its name and count. Unit letters are
    powers of 1024, as for sbatch."""
    parts = [item.strip() for item in re.split("[:=]", re.sub(r"\([^)]*\)", "", part.strip()).removeprefix("gres/"))]
    parts = [item for item in parts if item not in ("no_consume", "")]
    if len(parts) > 1 and (match := re.fullmatch(r"(\d+)([kmgtp]?)", parts[-1].lower(), re.ASCII)):
        return ":".join(parts[:-1]), int(match[1]) * 1024 ** " kmgtp".index(match[2] or " ")
    return ":".join(parts), 1


def parse_queue(text: str) -> dict[str, tuple[str, str]]:
    """Each job's state, and its reason and node, from lines of squeue in the format ``SQUEUE``; other lines are ignored.

    Raises SchedulerUnavailable on a truncated text: jobs that it leaves out may be running.
    """
    if text and not text.endswith("\n") and text.rpartition("\n")[2].count("|") < 3:
        raise SchedulerUnavailable(f"squeue's answer breaks off: {text[-80:]!r}.")
    return _states(text, (2, 3))


def parse_accounting(text: str) -> dict[str, tuple[str, str]]:
    """Each job's state and node, from lines of sacct with the fields ``SACCT``."""
    return _states(text, (2,))


def state_of(states: Mapping[str, tuple[str, str]], job: str) -> tuple[str, str]:
    """A job's state in the result of ``parse_queue`` or ``parse_accounting``; empty when it is not listed."""
    return states.get(job) or states.get(f"{job.partition('_')[0]}_{REST}", ("", ""))


def _states(text: str, detail_columns: Sequence[int]) -> dict[str, tuple[str, str]]:
    states: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        columns = [column.strip() for column in line.split("|")]
        match = JOB_ID.fullmatch(columns[0])
        if match is None or len(columns) < 2:
            continue
        state = (columns[1].split() or ["UNKNOWN"])[0].rstrip("+")  # "CANCELLED by 0"
        details = ", ".join(columns[i] for i in detail_columns if i < len(columns) and columns[i] not in ("", "None"))
        for job in _jobs(match):
            if job not in states or states[job][0] in SLURM_TERMINAL:  # of two lines the one with a living state counts
                states[job] = state, details
    return states


def _jobs(match: re.Match[str]) -> list[str]:
    """All ids that one of ``JOB_ID``'s forms stands for; a truncated list of tasks also stands for the rest."""
    job, task, tasks = match.groups()
    if tasks is None:
        return [job if task is None else f"{job}_{task}"]
    ranges = re.findall(r"(\d+)(?:-(\d+)(?::(\d+))?)?", tasks.partition("%")[0])
    listed = [f"{job}_{i}" for a, b, step in ranges for i in range(int(a), int(b or a) + 1, max(1, int(step or 1)))]
    return [*listed, *([f"{job}_{REST}"] if "..." in tasks or not match[0].endswith("]") else [])]


@dataclass(frozen=True)
class UserJob:
    """A job or array of the user's: ``command`` is its script with arguments, which SLURM joins by unquoted spaces."""

    id: str
    state: str
    folder: Path
    """Where it was submitted."""
    command: str


def user_jobs(cluster: str | None = None) -> list[UserJob]:
    """All jobs of the user in the queue, an array once. Raises as ``run_slurm_command``."""
    flags = ("--noheader", "--user", str(os.getuid()), f"--format={SEPARATOR.join(USER_JOB_FIELDS)}")
    lines = run_slurm_command("squeue", *flags, cluster=cluster).splitlines()
    rows = [fields for line in lines if len(fields := line.split(SEPARATOR)) == len(USER_JOB_FIELDS)]
    return [UserJob(job, state, Path(folder), command) for job, state, folder, command in rows]


def pending_reasons(jobs: Iterable[str], cluster: str | None = None) -> list[str]:
    """SLURM's reason for each of the ``jobs`` that is pending. Raises LaunchError when SLURM has forgotten one of them."""
    flags = ("--noheader", "--array", "--format=%T|%r", "--jobs", ",".join(sorted(jobs)))
    lines = run_slurm_command("squeue", *flags, cluster=cluster).splitlines()
    return [line.partition("|")[2] for line in lines if line.startswith("PENDING|")]


def job_states(names: Iterable[str], cluster: str | None = None) -> dict[str, tuple[str, str]]:
    """State and details of the user's jobs with one of these job names, as ``parse_queue``. Raises LaunchError."""
    selection = ("--user", str(os.getuid()), "--name", ",".join(sorted(names)), f"--format={SQUEUE}")
    return parse_queue(run_slurm_command("squeue", "--noheader", "--array", "--states=all", *selection, cluster=cluster))


def accounting_states(jobs: Iterable[str], cluster: str | None = None) -> dict[str, tuple[str, str]]:
    """State and node of the ``jobs`` in accounting, as ``parse_accounting``. Raises LaunchError without accounting."""
    return parse_accounting(run_slurm_command("sacct", "-X", "-n", "-P", "-j", ",".join(jobs), "-o", SACCT, cluster=cluster))


def cancel_jobs(*args: str, cluster: str | None = None) -> None:
    """One scancel with these flags and job ids; when the scheduler does not answer, the next poll tries again."""
    command = ["scancel", *to_cluster(cluster), *args]
    with suppress(subprocess.TimeoutExpired, OSError):
        subprocess.run(command, capture_output=True, timeout=ANSWER_S, check=False, env=commands_environment())


def minutes(limit: str) -> int | None:
    """SLURM's ``[days-]hours:minutes:seconds``, ``minutes:seconds`` in whole minutes; None for ``infinite``."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit.strip())
    if not match:
        return None
    days, hours, mins, _ = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + mins


def _associations(settings: Mapping[str, str]) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """The user's accounts and qos, where the cluster enforces them."""
    enforced = settings.get("AccountingStorageEnforce", "none").lower()
    if "associations" not in enforced:
        return None, None
    try:
        command = [
            "sacctmgr",
            "--noheader",
            "--parsable2",
            "show",
            "assoc",
            "where",
            f"user={pwd.getpwuid(os.getuid()).pw_name}",
            *([f"cluster={settings['ClusterName']}"] if settings.get("ClusterName") else []),
        ]
        rows = [line.split("|") for line in run_slurm_command(*command, "format=Account,QOS").splitlines() if "|" in line]
    except (LaunchError, KeyError):
        return None, None  # sbatch itself will report an invalid one
    accounts = sorted({row[0] for row in rows if row[0]})
    qos = sorted({name for row in rows for name in row[1].split(",") if name})
    return tuple(accounts) or None, (tuple(qos) or None) if "qos" in enforced else None


def sbatch_flags() -> Sequence[str]:
    """The long flags that sbatch knows, with ``_`` for ``-``."""
    return sorted(
        {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", run_slurm_command("sbatch", "--help"))}
    )
