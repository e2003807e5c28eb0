"""From ``launcher.slurm`` to sbatch's flags: the cluster's own values where none is given, an error that lists the valid
ones where one is wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import submitit

from isaerft_sweep.dispatch.cluster import NodeKind, SlurmCluster, gres_request, sbatch_flags
from isaerft_sweep.errors import LaunchError, suggest
from isaerft_sweep.specs import LauncherSpec

DEFAULT_MIN = 240
DEFAULT_CPUS, DEFAULT_MEM_GB = 4, 32
"""At most this much is asked for when nothing is said; a smaller node's share of one GPU where that is less."""
SUBMITIT_FLAGS = ("mem_gb", "python", "additional_parameters")
"""Keys of ``launcher.slurm`` that neither sbatch nor submitit's executor knows by that name."""
FROM_SHELL = ("account", "partition", "qos", "reservation", "constraint")
"""Flags that people set for good as a variable of their shell."""
RESERVED_FLAGS = {
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
    "time_min": "launcher.timeout_min: a trial must know its job's limit",
    "wrap": "nothing: the job runs a worker",
    **dict.fromkeys(
        ("parsable", "quiet", "verbose", "test_only", "wait", "help", "usage", "version"),
        "nothing: it changes what sbatch does or prints, which is read here",
    ),
}
LISTED = (list, tuple)
SCRIPT = ("setup", "teardown")
"""Lines of the job's script before and after the worker."""
GPU_FLAGS = ("gpus", "gpus_per_node", "gpus_per_task", "gpus_per_socket")
TRES_FLAGS = ("gres", "tres_per_node", "tres_per_job", "tres_per_socket", "tres_per_task")
"""Flags that may ask for GPUs among other things."""


def sbatch_parameters(spec: LauncherSpec, site: SlurmCluster, name: str) -> dict[str, Any]:
    """The parameters of submitit's SlurmExecutor for the jobs of a sweep. Raises LaunchError on an invalid one."""
    given = {key.replace("-", "_"): value for key, value in spec.slurm.items() if value is not None}
    for key in ("python", "clusters", "cluster"):  # see SlurmDispatcher
        given.pop(key, None)
    given = {**users_own(os.environ), **given}
    extra = given.pop("additional_parameters", {})
    if not isinstance(extra, Mapping):
        raise LaunchError(
            f"launcher.slurm.additional_parameters must be flags of sbatch with their values but got {extra!r}."
        )
    given |= {key.replace("-", "_"): value for key, value in extra.items() if value is not None}
    _check_names(given)
    given = {key: _plain(key, value) for key, value in given.items()}
    kinds = _partition(given, site)
    _check_choice("account", given, site.accounts)
    _check_choice("qos", given, site.qos)
    _check_constraint(given, kinds)
    _check_gres(given, kinds)
    time_min = _time_limit(spec.timeout_min, kinds)
    resources = _resources(given, kinds)
    known = submitit.SlurmExecutor._valid_parameters()
    given = {key: value for key, value in given.items() if value is not False}  # a flag that is switched off
    extra = {key: value for key, value in given.items() if key not in known}
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


def _plain(key: str, value: Any) -> Any:
    """A flag's value as sbatch and submitit take it: lists are joined, except lines of a script, whose text is split."""
    if key in SCRIPT:
        lines = value if isinstance(value, LISTED) else str(value).splitlines()
        if any(isinstance(line, (Mapping, *LISTED)) for line in lines):
            raise LaunchError(f"launcher.slurm.{key} must be lines of a script, ['module load cuda'], but got {value!r}.")
        return [str(line) for line in lines]
    if isinstance(value, LISTED) and key != "srun_args":
        return ",".join(map(str, value))
    if isinstance(value, Mapping):
        raise LaunchError(f"launcher.slurm.{key} must be a flag's value but got {value!r}.")
    return value


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
        if key in RESERVED_FLAGS:
            raise LaunchError(f"launcher.slurm.{key} must not be set here. What decides it: {RESERVED_FLAGS[key]}.")
    known = {*submitit.SlurmExecutor._valid_parameters(), *SUBMITIT_FLAGS}
    unknown = [key for key in given if key not in known]
    if not unknown:
        return
    valid = {*known, *sbatch_flags()} - set(RESERVED_FLAGS)
    for key in unknown:
        if key not in valid:
            raise LaunchError(f"launcher.slurm has no '{key}': it must be a flag of sbatch." + suggest(key, valid))


def _partition(given: Mapping[str, Any], site: SlurmCluster) -> list[NodeKind]:
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
    """Of accounts and qos, which SLURM keeps in small letters and takes in any."""
    if key in given and valid is not None and str(given[key]).lower() not in {name.lower() for name in valid}:
        raise LaunchError(f"launcher.slurm.{key} is not yours to use: '{given[key]}'." + suggest(str(given[key]), valid))


def _check_constraint(given: Mapping[str, Any], kinds: list[NodeKind]) -> None:
    """Every feature that a constraint names (``a100&nvlink``, ``[rack1|rack2]``, ``big*2``) must exist."""
    valid = {part for kind in kinds for feature in kind.features for part in {feature, *feature.split("|")}}
    for word in re.split(r"[&|,!()\[\]]+", str(given.get("constraint", ""))):
        feature = word.split("*")[0].strip()
        if feature and feature not in valid:
            raise LaunchError(f"launcher.slurm.constraint names an unknown feature: '{feature}'." + suggest(feature, valid))


def _check_gres(given: Mapping[str, Any], kinds: list[NodeKind]) -> None:
    most: dict[str, int] = {}
    for kind in kinds:
        for name, count in kind.gres.items():
            most[name] = max(count, most.get(name, 0))
    for part in [p for p in str(given.get("gres", "")).split(",") if p.strip().lower() not in ("", "none")]:
        name, count = gres_request(part)
        if name not in most:
            raise LaunchError(f"launcher.slurm.gres names an unknown resource: '{name}'." + suggest(name, most))
        _check_at_most("gres", part.strip().removeprefix("gres/"), count, most[name])
    if "gpus_per_node" in given:
        asked = str(given["gpus_per_node"])
        wanted = [gres_request(f"gpu:{part}") for part in asked.split(",")]
        for name, count in wanted:
            if count and name not in most:
                listed = ", ".join(sorted(key for key in most if key.startswith("gpu"))) or "none"
                raise LaunchError(
                    f"launcher.slurm.gpus_per_node must name GPUs of the nodes but got {asked}. Valid: {listed}."
                )
            _check_at_most("gpus_per_node", asked, count, most.get(name, 0))


def _asks_for_gpus(given: Mapping[str, Any]) -> bool:
    """Whether it is said how many GPUs a job gets, or that it gets none."""
    listed = [part.strip().lower() for key in TRES_FLAGS for part in str(given.get(key, "")).split(",")]
    of_gpus = [re.match(r"(gres[/:])?(gpu|shard|mps)\b", part) or part == "none" for part in listed]
    return bool(set(GPU_FLAGS) & set(given)) or any(of_gpus)


def _whole_number(key: str, given: Mapping[str, Any], least: int = 1) -> int:
    """A flag's value as a whole number. Raises LaunchError when it is none."""
    said = str(given[key]).strip()
    number = int(said) if re.fullmatch(r"\d{1,9}", said, re.ASCII) else None
    if number is None or number < least:
        raise LaunchError(f"launcher.slurm.{key} must be a whole number of at least {least} but got '{said}'.")
    return number


def _memory_mb(given: Mapping[str, Any]) -> int:
    """``mem_gb`` in megabytes. Raises LaunchError when it is no number of gigabytes."""
    said = str(given["mem_gb"]).strip()
    found = re.fullmatch(r"(\d{1,9}(?:\.\d*)?|\.\d+)", said, re.ASCII)
    if not found or float(said) * 1024 < 1:
        raise LaunchError(
            f"launcher.slurm.mem_gb must be a number of gigabytes (mem_gb=32) but got '{said}'. Another unit: "
            "+launcher.slurm.mem=32000M."
        )
    return int(float(said) * 1024)


def _check_at_most(key: str, given: Any, value: float, most: float, unit: str = "") -> None:
    if value > most:
        raise LaunchError(f"launcher.slurm.{key} must be at most {most:g}{unit}, the largest node's, but got {given}.")


def _time_limit(asked_min: int | None, kinds: list[NodeKind]) -> int:
    """Minutes: what is asked for, or four hours, or the partition's limit where that is less."""
    limits = [kind.max_min for kind in kinds]
    most = None if None in limits else max(limit for limit in limits if limit is not None)
    if asked_min is None:
        return max(1, min(DEFAULT_MIN, most)) if most is not None else DEFAULT_MIN
    if most is not None and asked_min > most:
        names = ", ".join(f"{kind.partition} {kind.max_min} min" for kind in kinds)
        raise LaunchError(f"launcher.timeout_min must be at most the partition's limit ({names}) but got {asked_min}.")
    return asked_min


def _resources(given: dict[str, Any], kinds: list[NodeKind]) -> dict[str, Any]:
    """GPUs, cores and memory: one GPU where the nodes have any, and a node's share of cores and memory for it."""
    found: dict[str, Any] = {}
    share = max(kinds, key=lambda kind: kind.gpus)
    parts = max(1, share.gpus)
    if share.gpus and not _asks_for_gpus(given):
        found["gpus_per_node"] = 1
    if "array_parallelism" in given:
        found["array_parallelism"] = _whole_number("array_parallelism", given)
    most_cpus, most_mb = max(kind.cpus for kind in kinds), max(kind.memory_mb for kind in kinds)
    if "cpus_per_task" in given:
        found["cpus_per_task"] = _whole_number("cpus_per_task", given)
        _check_at_most("cpus_per_task", given["cpus_per_task"], found["cpus_per_task"], most_cpus)
    elif "cpus_per_gpu" not in given:
        found["cpus_per_task"] = max(1, min(DEFAULT_CPUS, share.cpus // parts))
    if "mem_gb" in given:
        memory_mb = _memory_mb(given)
        _check_at_most("mem_gb", given.pop("mem_gb"), memory_mb / 1024, most_mb / 1024, " GB")
        found["mem"] = f"{memory_mb}MB"
    elif not {"mem", "mem_per_cpu", "mem_per_gpu"} & set(given) and share.memory_mb > 1:
        found["mem"] = f"{min(DEFAULT_MEM_GB * 1024, share.memory_mb // parts)}MB"
    return found
