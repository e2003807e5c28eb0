"""From ``launcher.slurm`` to sbatch's flags: the cluster's own values where none is given, an error that lists the valid
ones where one is wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import submitit

from isaerft_sweep.dispatch.slurm_site import NodeKind, Site, sbatch_flags
from isaerft_sweep.errors import LaunchError, suggest
from isaerft_sweep.specs import LauncherSpec

DEFAULT_MIN = 240
DEFAULT_CPUS, DEFAULT_MEM_GB = 4, 32
"""At most this much is asked for when nothing is said; a smaller node's share of one GPU where that is less."""
ALSO = ("mem_gb", "python", "additional_parameters")
"""Keys of ``launcher.slurm`` that neither sbatch nor submitit's executor knows by that name."""
FROM_SHELL = ("account", "partition", "qos", "reservation", "constraint")
"""Flags that people set for good as a variable of their shell."""
OURS = {
    "array": "launcher.slots",
    "time": "launcher.timeout_min",
    "signal": "launcher.grace_s",
    "signal_delay_s": "launcher.grace_s",
    "output": "the sweep's folder jobs/",
    "error": "the sweep's folder jobs/",
    "open_mode": "the sweep's folder jobs/",
    "requeue": "launcher.max_retries: the controller itself starts a trial again, in a new job",
    "no_requeue": "launcher.max_retries: the controller itself starts a trial again, in a new job",
    "nodes": "nothing: a trial runs on one node",
    "ntasks": "nothing: a trial is one process",
    "ntasks_per_node": "nothing: a trial is one process",
    "use_srun": "nothing: signals reach a trial through srun",
    "stderr_to_stdout": "nothing: one log holds both",
}


def sbatch_parameters(spec: LauncherSpec, site: Site, name: str) -> dict[str, Any]:
    """The parameters of submitit's SlurmExecutor for the jobs of a sweep. Raises LaunchError on an invalid one."""
    given = {key.replace("-", "_"): value for key, value in spec.slurm.items() if value is not None}
    given.pop("python", None)
    given = {**users_own(os.environ), **given}
    extra = dict(given.pop("additional_parameters", {}))
    _check_names(given)
    kinds = _partition(given, site)
    _check_choice("account", given, site.accounts)
    _check_choice("qos", given, site.qos)
    _check_constraint(given, kinds)
    _check_gres(given, kinds)
    time_min = _time_limit(spec.timeout_min, kinds)
    resources = _resources(given, kinds)
    known = submitit.SlurmExecutor._valid_parameters()
    extra |= {key: value for key, value in given.items() if key not in known}
    prefix = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(given.pop("job_name", "")))
    return {
        **{key: value for key, value in given.items() if key in known},
        **resources,
        "job_name": f"{prefix}-{name}" if prefix else name,
        "time": time_min,
        "stderr_to_stdout": True,
        "additional_parameters": {
            **extra,
            # SLURM would start a job again under the same attempt, beside an orphan of the first start: docs/design.md
            "no-requeue": True,
            # on preemption, where the site asks for it; before the time limit the job's own clock tells, not up to a
            # minute too early
            "signal": "USR2@0",
        },
    }


def users_own(environment: Mapping[str, str]) -> dict[str, Any]:
    """What the user's shell sets for every sbatch (``SBATCH_ACCOUNT``). Within a job the variables are that job's."""
    if "SLURM_JOB_ID" in environment:
        return {}
    return {key: value for key in FROM_SHELL if (value := environment.get(f"SBATCH_{key.upper()}"))}


def working_s(time_min: int, grace_s: float) -> float:
    """How long a job of ``time_min`` minutes works before it begins to end."""
    return time_min * 60 - min(grace_s, time_min * 60 / 4)


def _check_names(given: Mapping[str, Any]) -> None:
    for key in given:
        if key in OURS:
            raise LaunchError(f"launcher.slurm.{key} must not be set here. What decides it: {OURS[key]}.")
    known = {*submitit.SlurmExecutor._valid_parameters(), *ALSO}
    unknown = [key for key in given if key not in known]
    if not unknown:
        return
    valid = {*known, *sbatch_flags()} - set(OURS)
    for key in unknown:
        if key not in valid:
            raise LaunchError(f"launcher.slurm has no '{key}': it must be a flag of sbatch." + suggest(key, valid))


def _partition(given: Mapping[str, Any], site: Site) -> list[NodeKind]:
    """The nodes that a job may get."""
    asked = given.get("partition") or site.default_partition
    if asked is None:
        raise LaunchError(
            "launcher.slurm.partition must be set, for this cluster has no default one. Valid: "
            f"{', '.join(site.partitions)}."
        )
    for name in str(asked).split(","):
        if name not in site.partitions:
            raise LaunchError(f"launcher.slurm.partition is unknown: '{name}'." + suggest(name, site.partitions))
    return site.kinds_of(str(asked))


def _check_choice(key: str, given: Mapping[str, Any], valid: Iterable[str] | None) -> None:
    if key in given and valid is not None and str(given[key]) not in valid:
        raise LaunchError(f"launcher.slurm.{key} is not yours to use: '{given[key]}'." + suggest(str(given[key]), valid))


def _check_constraint(given: Mapping[str, Any], kinds: list[NodeKind]) -> None:
    """Every feature that a constraint names (``a100&nvlink``, ``[rack1|rack2]``, ``big*2``) must exist."""
    valid = {feature for kind in kinds for feature in kind.features}
    for word in re.split(r"[&|,!()\[\]]+", str(given.get("constraint", ""))):
        feature = word.split("*")[0].strip()
        if feature and feature not in valid:
            raise LaunchError(f"launcher.slurm.constraint names an unknown feature: '{feature}'." + suggest(feature, valid))


def _check_gres(given: Mapping[str, Any], kinds: list[NodeKind]) -> None:
    most: dict[str, int] = {}
    for kind in kinds:
        for name, count in kind.gres.items():
            most[name] = max(count, most.get(name, 0))
    for part in [p for p in str(given.get("gres", "")).split(",") if p.strip()]:
        words = part.strip().removeprefix("gres/").split(":")
        count = int(words.pop()) if words[-1].isdecimal() else 1
        name = ":".join(words)
        if name not in most:
            raise LaunchError(f"launcher.slurm.gres names an unknown resource: '{name}'." + suggest(name, most))
        _check_at_most("gres", f"{name}:{count}", count, most[name])
    if "gpus_per_node" in given:
        asked = str(given["gpus_per_node"])
        gpu_type, _, number = asked.rpartition(":")
        name = f"gpu:{gpu_type}" if gpu_type else "gpu"
        if number.isdecimal() and int(number) and name not in most:
            listed = ", ".join(sorted(key for key in most if key.startswith("gpu"))) or "none"
            raise LaunchError(f"launcher.slurm.gpus_per_node must name GPUs of the nodes but got {asked}. Valid: {listed}.")
        if number.isdecimal():
            _check_at_most("gpus_per_node", asked, int(number), most.get(name, 0))


def _check_at_most(key: str, given: Any, value: float, most: float, unit: str = "") -> None:
    if value > most:
        raise LaunchError(f"launcher.slurm.{key} must be at most {most:g}{unit}, the largest node's, but got {given}.")


def _time_limit(asked_min: int | None, kinds: list[NodeKind]) -> int:
    """Minutes: what is asked for, or four hours, or the partition's limit where that is less."""
    limits = [kind.max_min for kind in kinds]
    most = None if None in limits else max(limit for limit in limits if limit is not None)
    if asked_min is None:
        return min(DEFAULT_MIN, most) if most is not None else DEFAULT_MIN
    if most is not None and asked_min > most:
        names = ", ".join(f"{kind.partition} {kind.max_min} min" for kind in kinds)
        raise LaunchError(f"launcher.timeout_min must be at most the partition's limit ({names}) but got {asked_min}.")
    return asked_min


def _resources(given: dict[str, Any], kinds: list[NodeKind]) -> dict[str, Any]:
    """GPUs, cores and memory: one GPU where the nodes have any, and a node's share of cores and memory for it."""
    found: dict[str, Any] = {}
    gpus_said = {"gpus_per_node", "gpus_per_task", "gres", "gpus"} & set(given)
    share = max(kinds, key=lambda kind: kind.gpus)
    parts = max(1, share.gpus)
    if not gpus_said and share.gpus:
        found["gpus_per_node"] = 1
    most_cpus, most_mb = max(kind.cpus for kind in kinds), max(kind.memory_mb for kind in kinds)
    if "cpus_per_task" in given:
        _check_at_most("cpus_per_task", given["cpus_per_task"], int(given["cpus_per_task"]), most_cpus)
    elif "cpus_per_gpu" not in given:
        found["cpus_per_task"] = max(1, min(DEFAULT_CPUS, share.cpus // parts))
    if "mem_gb" in given:
        mem_gb = float(given.pop("mem_gb"))
        _check_at_most("mem_gb", f"{mem_gb:g}", mem_gb, most_mb / 1024, " GB")
        found["mem"] = f"{int(mem_gb * 1024)}MB"
    elif not {"mem", "mem_per_cpu", "mem_per_gpu"} & set(given) and share.memory_mb > 1:
        found["mem"] = f"{min(DEFAULT_MEM_GB * 1024, share.memory_mb // parts)}MB"
    return found
