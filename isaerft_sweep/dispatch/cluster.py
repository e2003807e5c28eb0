"""What a SLURM cluster says, by its own commands: settings, partitions, nodes, accounts, and the states of jobs."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from isaerft_sweep.dispatch.base import SchedulerUnavailable
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.specs import LauncherSpec

ANSWER_S = 60
"""How long a command of the cluster may take before it counts as not answering."""
SINFO = "%R|%P|%c|%m|%l|%f|%G"
SQUEUE = "%i|%T|%r|%N"
SACCT = "JobID,State,NodeList"
SLURM_TERMINAL = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED",
    "REVOKED", "LAUNCH_FAILED",
}  # fmt: skip
"""States of a job that has ended. Every other one, also one that this code does not know, is that of a living job."""
SETTING = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SQUEUE_", "SINFO_", "SACCT_", "SCONTROL_", "SCANCEL_", "SALLOC_")
"""Beginnings of variables by which a shell or a job changes what SLURM's commands show and do."""
PLACE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_SOCKET")
"""Of those the ones without which the commands may not find their cluster or may not be let in."""
HIDING = ("squeue", "sinfo", "scontrol")
"""Commands that leave out hidden partitions, and jobs in them, unless they are told otherwise."""
JOB_ID = re.compile(r"(\d+)(?:_(?:(\d+)|\[([^]]*)\]?))?")
"""``12``, ``12_3``, and ``12_[0-3,5%2]`` for many tasks of an array in one line."""
REST = "*"
"""Stands for an array's tasks that a line leaves out: ``12_[0-3,...]``."""


def run_slurm_command(*command: str, cluster: str | None = None) -> str:
    """What a command of the cluster prints.

    Raises SchedulerUnavailable when it does not answer, LaunchError when there is none.

    ``cluster``: another one than this machine's.
    """
    program, *arguments = command
    whole = [program, *(["--all"] if program in HIDING else []), *to_cluster(cluster), *arguments]
    try:
        done = subprocess.run(
            whole, capture_output=True, encoding="utf-8", errors="replace", timeout=ANSWER_S, check=False,
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
        said = " ".join(done.stderr.split())[-500:]
        if "configuration source" in said:
            raise LaunchError(
                f"launcher=slurm needs a machine that belongs to a SLURM cluster, but '{program}' finds no configuration of "
                "one. Start it on a login node, set SLURM_CONF, or use launcher=local."
            )
        raise SchedulerUnavailable(f"'{' '.join(command[:3])}' failed: {said}. See: scontrol ping")
    return done.stdout


def commands_environment() -> dict[str, str]:
    """What SLURM's commands run with: nothing that a shell or a job has set for them may hide a job from us."""
    return {key: value for key, value in os.environ.items() if key in PLACE or not key.startswith(SETTING)}


def to_cluster(cluster: str | None) -> list[str]:
    """The flag that sends a command to another cluster."""
    return [] if cluster is None else [f"--clusters={cluster}"]


@dataclass(frozen=True)
class NodeKind:
    """Nodes of one partition that are alike. ``max_min``: the partition's time limit in minutes, None without one."""

    partition: str
    default: bool
    cpus: int
    memory_mb: int
    max_min: int | None
    features: tuple[str, ...]
    gres: Mapping[str, int]
    """How many a node has of ``gpu`` and of ``gpu:a100``."""

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
        said = self.settings.get("MaxArraySize", "")
        return max(1, int(said)) if said.isdecimal() else 1001

    def kinds_of(self, partition: str) -> list[NodeKind]:
        """The nodes of a partition, or of several (``a,b``)."""
        return [kind for kind in self.kinds if kind.partition in partition.split(",")]


def read_cluster(cluster: str | None = None) -> SlurmCluster:
    """The cluster that this machine belongs to, or another one.

    Raises LaunchError when there is none, SchedulerUnavailable when it does not answer.
    """
    settings = parse_settings(run_slurm_command("scontrol", "show", "config", cluster=cluster))
    said = run_slurm_command("sinfo", "--noheader", "--exact", f"--format={SINFO}", cluster=cluster)
    kinds = tuple(kind for line in said.splitlines() if (kind := parse_kind(line)) is not None)
    if not kinds:
        raise LaunchError(
            f"sinfo must list the cluster's nodes, one kind a line ('{SINFO}'), but said {said.strip()[:200]!r}. "
            "See: sinfo --all"
        )
    accounts, qos = _associations(settings)
    return SlurmCluster(settings, kinds, accounts, qos)


def cluster_of(spec: LauncherSpec) -> str | None:
    """The cluster that was asked for, by ``launcher.slurm.clusters`` or for good in the user's shell; None: this machine's.

    Raises LaunchError when several are named.
    """
    name = _asked_cluster(spec, os.environ)
    own = parse_settings(run_slurm_command("scontrol", "show", "config")).get("ClusterName", "") if name else ""
    return None if name is None or name.lower() == own.lower() else name


def _asked_cluster(spec: LauncherSpec, environment: Mapping[str, str]) -> str | None:
    said = {"launcher.slurm.clusters": spec.slurm.get("clusters") or spec.slurm.get("cluster")}
    if "SLURM_JOB_ID" not in environment:  # within a job the variables are that job's
        said |= {key: environment.get(key) for key in ("SBATCH_CLUSTERS", "SLURM_CLUSTERS")}
    for key, value in said.items():
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
    """A line of sinfo in the format ``SINFO``; None for one that says something else (a banner, the cluster's name)."""
    words = line.split("|")
    if len(words) < 7:
        return None
    name, marked, cpus, memory, limit, *features, gres = words  # a feature may hold a bar
    if not name.strip() or _number(cpus) is None or _number(memory) is None:
        return None
    found = "|".join(features).strip()
    named = () if found in ("(null)", "") else tuple(word.strip() for word in found.split(","))
    return NodeKind(
        name.strip(), marked.strip().endswith("*"), _number(cpus) or 0, _number(memory) or 0, minutes(limit), named,
        parse_gres(gres),
    )  # fmt: skip


def _number(text: str) -> int | None:
    found = re.fullmatch(r"(\d+)\+?", text.strip(), re.ASCII)  # "128+" where nodes differ
    return int(found[1]) if found else None


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
    """One entry of a list of generic resources, ``gpu:a100:2`` or ``tmpfs:200G``: its name and how many. The letters mean
    powers of 1024, as for sbatch."""
    words = [word.strip() for word in re.split("[:=]", re.sub(r"\([^)]*\)", "", part.strip()).removeprefix("gres/"))]
    words = [word for word in words if word not in ("no_consume", "")]
    if len(words) > 1 and (found := re.fullmatch(r"(\d+)([kmgtp]?)", words[-1].lower(), re.ASCII)):
        return ":".join(words[:-1]), int(found[1]) * 1024 ** " kmgtp".index(found[2] or " ")
    return ":".join(words), 1


def parse_queue(text: str) -> dict[str, tuple[str, str]]:
    """Each job's state, and the reason and node, from lines of squeue in the format ``SQUEUE``; other lines are left out.

    Raises SchedulerUnavailable on a text that breaks off: what it does not tell of may be running.
    """
    if text and not text.endswith("\n") and text.rpartition("\n")[2].count("|") < 3:
        raise SchedulerUnavailable(f"squeue's answer breaks off: {text[-80:]!r}.")
    return _states(text, (2, 3))


def parse_accounting(text: str) -> dict[str, tuple[str, str]]:
    """Each job's state and node, from lines of sacct with the fields ``SACCT``."""
    return _states(text, (2,))


def state_of(states: Mapping[str, tuple[str, str]], job: str) -> tuple[str, str]:
    """A job's state in what ``parse_queue`` or ``parse_accounting`` has found; empty when there is none."""
    return states.get(job) or states.get(f"{job.partition('_')[0]}_{REST}", ("", ""))


def _states(text: str, more: Sequence[int]) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        words = [word.strip() for word in line.split("|")]
        match = JOB_ID.fullmatch(words[0])
        if match is None or len(words) < 2:
            continue
        state = (words[1].split() or ["UNKNOWN"])[0].rstrip("+")  # "CANCELLED by 0"
        facts = state, ", ".join(words[i] for i in more if i < len(words) and words[i] not in ("", "None"))
        for job in _jobs(match):
            if (
                job not in found or found[job][0] in SLURM_TERMINAL
            ):  # of two lines about one job the one that says it lives holds
                found[job] = facts
    return found


def _jobs(match: re.Match[str]) -> list[str]:
    """All ids that one of ``JOB_ID``'s forms stands for; a list of tasks that breaks off stands for the others too."""
    job, task, tasks = match.groups()
    if tasks is None:
        return [job if task is None else f"{job}_{task}"]
    ranges = re.findall(r"(\d+)(?:-(\d+)(?::(\d+))?)?", tasks.partition("%")[0])
    listed = [f"{job}_{i}" for a, b, step in ranges for i in range(int(a), int(b or a) + 1, max(1, int(step or 1)))]
    return [*listed, *([f"{job}_{REST}"] if "..." in tasks or not match[0].endswith("]") else [])]


def minutes(limit: str) -> int | None:
    """SLURM's ``[days-]hours:minutes:seconds``, ``minutes:seconds`` in whole minutes; None for ``infinite``."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit.strip())
    if not match:
        return None
    days, hours, mins, _ = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + mins


def _associations(settings: Mapping[str, str]) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """The user's accounts and qos, where the cluster insists on them."""
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
        return None, None  # sbatch itself will tell
    accounts = sorted({row[0] for row in rows if row[0]})
    qos = sorted({name for row in rows for name in row[1].split(",") if name})
    return tuple(accounts) or None, (tuple(qos) or None) if "qos" in enforced else None


def sbatch_flags() -> Sequence[str]:
    """The long flags that sbatch knows, with ``_`` for ``-``."""
    return sorted(
        {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", run_slurm_command("sbatch", "--help"))}
    )
