"""What a SLURM cluster offers, as its own commands tell: settings, partitions, nodes, accounts."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from isaerft_sweep.dispatch.base import QueueBusy
from isaerft_sweep.errors import LaunchError

ANSWER_S = 60
"""How long a command of the cluster may take before it counts as not answering."""
SINFO = "%R|%P|%c|%m|%l|%f|%G"


def ask(*command: str) -> str:
    """What a command of the cluster prints. Raises QueueBusy when it does not answer, LaunchError when there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except FileNotFoundError as error:
        raise LaunchError(
            f"launcher=slurm needs SLURM's commands on this machine, but there is no '{command[0]}'. Start it on a login "
            "node, or use launcher=local."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise QueueBusy(f"'{command[0]}' has not answered for {ANSWER_S} s. Is slurmctld up? See: scontrol ping") from error
    if done.returncode:
        raise QueueBusy(f"'{' '.join(command[:3])}' failed: {done.stderr.strip()[-500:]}. See: scontrol ping")
    return done.stdout


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
class Site:
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
        return max(1, int(self.settings.get("MaxArraySize", "1001")))

    def kinds_of(self, partition: str) -> list[NodeKind]:
        """The nodes of a partition, or of several (``a,b``)."""
        return [kind for kind in self.kinds if kind.partition in partition.split(",")]


def read_site() -> Site:
    """The cluster that this machine belongs to. Raises LaunchError when there is none, QueueBusy when it does not answer."""
    settings = parse_settings(ask("scontrol", "show", "config"))
    kinds = tuple(
        parse_kind(line) for line in ask("sinfo", "--noheader", "--all", "--exact", f"--format={SINFO}").splitlines()
    )
    accounts, qos = _associations(settings)
    return Site(settings, kinds, accounts, qos)


def parse_settings(text: str) -> dict[str, str]:
    """``scontrol show config`` as a mapping."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def parse_kind(line: str) -> NodeKind:
    """A line of sinfo in the format ``SINFO``."""
    name, marked, cpus, memory, limit, features, gres = line.split("|")
    found = () if features == "(null)" else tuple(features.split(","))
    return NodeKind(name, marked.endswith("*"), _number(cpus), _number(memory), minutes(limit), found, parse_gres(gres))


def _number(text: str) -> int:
    return int(re.sub(r"\D", "", text) or 0)  # "128+" where nodes differ


def parse_gres(text: str) -> dict[str, int]:
    """``gpu:a100:4(S:0-1),disk:100`` as counts of ``gpu``, ``gpu:a100`` and ``disk``."""
    counts: dict[str, int] = {}
    for part in re.sub(r"\([^)]*\)", "", text).split(","):
        words = part.strip().split(":")
        if not words[0]:
            continue
        count = int(words[-1]) if words[-1].isdecimal() and len(words) > 1 else 1
        names = words[:-1] if words[-1].isdecimal() and len(words) > 1 else words
        for name in {names[0], ":".join(names)}:
            counts[name] = counts.get(name, 0) + count
    return counts


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
        ]
        rows = [line.split("|") for line in ask(*command, "format=Account,QOS").splitlines() if "|" in line]
    except (LaunchError, KeyError):
        return None, None  # sbatch itself will tell
    accounts = sorted({row[0] for row in rows if row[0]})
    qos = sorted({name for row in rows for name in row[1].split(",") if name})
    return tuple(accounts) or None, (tuple(qos) or None) if "qos" in enforced else None


def sbatch_flags() -> Sequence[str]:
    """The long flags that sbatch knows, with ``_`` for ``-``."""
    return sorted({flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", ask("sbatch", "--help"))})
