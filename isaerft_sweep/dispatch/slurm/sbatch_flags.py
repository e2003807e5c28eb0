"""Turns ``launcher.slurm`` into sbatch's flags: defaults come from the cluster, a wrong value raises an error that lists the
valid ones."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import submitit

from isaerft_sweep.dispatch.slurm.cluster import NodeKind, SlurmCluster, gres_request, sbatch_flags
from isaerft_sweep.errors import LaunchError, suggest
from isaerft_sweep.specs import LauncherSpec

DEFAULT_MIN = 240
DEFAULT_CPUS, DEFAULT_MEM_GB = 4, 32
"""The defaults; or the cores and memory of a node divided by its GPUs, where that is less."""
SUBMITIT_FLAGS = ("mem_gb", "python", "additional_parameters")
"""Keys of ``launcher.slurm`` that neither sbatch nor submitit's executor has under that name."""
FROM_SHELL = ("account", "partition", "qos", "reservation", "constraint")
"""Flags that users set permanently by a variable of their shell."""
RESERVED_FLAGS = {
    "array": "launcher.slots",
    "time": "launcher.timeout_min",
    "signal": "launcher.grace_s",
    "signal_delay_s": "launcher.grace_s",
    "output": "the sweep's folder jobs/",
    "error": "the sweep's folder jobs/",
    "open_mode": "the sweep's folder jobs/",
    "requeue": "launcher.max_retries: the controller itself retries a trial, in a new job",
    "no_requeue": "launcher.max_retries: the controller itself retries a trial, in a new job",
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
    flags = {key.replace("-", "_"): value for key, value in spec.slurm.items() if value is not None}
    for key in ("python", "clusters", "cluster"):  # see SlurmDispatcher
        flags.pop(key, None)
    flags = {**flags_from_shell(os.environ), **flags}
    extra = flags.pop("additional_parameters", {})
    if not isinstance(extra, Mapping):
        raise LaunchError(
            f"launcher.slurm.additional_parameters must be flags of sbatch with their values but got {extra!r}."
        )
    flags |= {key.replace("-", "_"): value for key, value in extra.items() if value is not None}
    _check_names(flags)
    flags = {key: _plain(key, value) for key, value in flags.items()}
    kinds = _partition_nodes(flags, site)
    _check_choice("account", flags, site.accounts)
    _check_choice("qos", flags, site.qos)
    _check_constraint(flags, kinds)
    _check_gres(flags, kinds)
    time_min = _time_limit(spec.timeout_min, kinds)
    resources = _resources(flags, kinds)
    submitit_keys = submitit.SlurmExecutor._valid_parameters()
    flags = {key: value for key, value in flags.items() if value is not False}  # a flag that is switched off
    extra = {key: value for key, value in flags.items() if key not in submitit_keys}
    prefix = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(flags.pop("job_name", "")))
    return {
        **{key: value for key, value in flags.items() if key in submitit_keys},
        **resources,
        "job_name": f"{prefix}-{name}" if prefix else name,
        "time": time_min,
        "stderr_to_stdout": True,
        "additional_parameters": {
            **extra,
            # a requeued job would run the same attempt, perhaps beside an orphan of its first start: docs/design.md
            "no-requeue": True,
            # for preemption, where the site sends it; for the time limit the job uses its own clock, since SLURM's signal
            # may come a minute early
            "signal": "USR2@0",
        },
    }


def _plain(key: str, value: Any) -> Any:
    """A flag's value as sbatch and submitit expect it: lists are joined by commas; script lines become a list."""
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


def flags_from_shell(environment: Mapping[str, str]) -> dict[str, Any]:
    """The user's defaults for every sbatch (``SBATCH_ACCOUNT``); empty within a job, where they are that job's flags."""
    if "SLURM_JOB_ID" in environment:
        return {}
    return {key: value for key in FROM_SHELL if (value := environment.get(f"SBATCH_{key.upper()}"))}


def working_s(time_min: int, grace_s: float) -> float:
    """How many seconds a job of ``time_min`` minutes trains before it begins to end."""
    return time_min * 60 - min(grace_s, time_min * 60 / 4)


def _check_names(flags: Mapping[str, Any]) -> None:
    for key in flags:
        if key in RESERVED_FLAGS:
            raise LaunchError(f"launcher.slurm.{key} must not be set here. What decides it: {RESERVED_FLAGS[key]}.")
    known = {*submitit.SlurmExecutor._valid_parameters(), *SUBMITIT_FLAGS}
    unknown = [key for key in flags if key not in known]
    if not unknown:
        return
    valid = {*known, *sbatch_flags()} - set(RESERVED_FLAGS)
    for key in unknown:
        if key not in valid:
            raise LaunchError(f"launcher.slurm has no '{key}': it must be a flag of sbatch." + suggest(key, valid))


def _partition_nodes(flags: Mapping[str, Any], site: SlurmCluster) -> list[NodeKind]:
    """The nodes that a job may get."""
    partition = flags.get("partition") or site.default_partition
    if partition is None:
        raise LaunchError(
            "launcher.slurm.partition must be set, since this cluster has no default one. Valid: "
            f"{', '.join(site.partitions)}."
        )
    for name in str(partition).split(","):
        if name not in site.partitions:
            raise LaunchError(f"launcher.slurm.partition is unknown: '{name}'." + suggest(name, site.partitions))
    return site.kinds_of(str(partition))


def _check_choice(key: str, flags: Mapping[str, Any], valid: Iterable[str] | None) -> None:
    """Check an account or qos, whose case SLURM ignores."""
    if key in flags and valid is not None and str(flags[key]).lower() not in {name.lower() for name in valid}:
        raise LaunchError(f"launcher.slurm.{key} is not yours to use: '{flags[key]}'." + suggest(str(flags[key]), valid))


def _check_constraint(flags: Mapping[str, Any], kinds: list[NodeKind]) -> None:
    """Every feature that a constraint names (``a100&nvlink``, ``[rack1|rack2]``, ``big*2``) must exist."""
    valid = {part for kind in kinds for feature in kind.features for part in {feature, *feature.split("|")}}
    for part in re.split(r"[&|,!()\[\]]+", str(flags.get("constraint", ""))):
        feature = part.split("*")[0].strip()
        if feature and feature not in valid:
            raise LaunchError(f"launcher.slurm.constraint names an unknown feature: '{feature}'." + suggest(feature, valid))


def _check_gres(flags: Mapping[str, Any], kinds: list[NodeKind]) -> None:
    max_counts: dict[str, int] = {}
    for kind in kinds:
        for name, count in kind.gres.items():
            max_counts[name] = max(count, max_counts.get(name, 0))
    for part in [p for p in str(flags.get("gres", "")).split(",") if p.strip().lower() not in ("", "none")]:
        name, count = gres_request(part)
        if name not in max_counts:
            raise LaunchError(f"launcher.slurm.gres names an unknown resource: '{name}'." + suggest(name, max_counts))
        _check_at_most("gres", part.strip().removeprefix("gres/"), count, max_counts[name])
    if "gpus_per_node" in flags:
        requested = str(flags["gpus_per_node"])
        for name, count in [gres_request(f"gpu:{part}") for part in requested.split(",")]:
            if count and name not in max_counts:
                listed = ", ".join(sorted(key for key in max_counts if key.startswith("gpu"))) or "none"
                raise LaunchError(
                    f"launcher.slurm.gpus_per_node must name GPUs of the nodes but got {requested}. Valid: {listed}."
                )
            _check_at_most("gpus_per_node", requested, count, max_counts.get(name, 0))


def _sets_gpus(flags: Mapping[str, Any]) -> bool:
    """Whether the flags set the number of GPUs, 0 included."""
    resources = [part.strip().lower() for key in TRES_FLAGS for part in str(flags.get(key, "")).split(",")]
    return bool(set(GPU_FLAGS) & set(flags)) or any(
        re.match(r"(gres[/:])?(gpu|shard|mps)\b", resource) or resource == "none" for resource in resources
    )


def _whole_number(key: str, flags: Mapping[str, Any], least: int = 1) -> int:
    """A flag's value as a whole number. Raises LaunchError when it is none."""
    text = str(flags[key]).strip()
    number = int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else None
    if number is None or number < least:
        raise LaunchError(f"launcher.slurm.{key} must be a whole number of at least {least} but got '{text}'.")
    return number


def _memory_mb(flags: Mapping[str, Any]) -> int:
    """``mem_gb`` in megabytes. Raises LaunchError when it is no number of gigabytes."""
    text = str(flags["mem_gb"]).strip()
    if not re.fullmatch(r"(\d{1,9}(?:\.\d*)?|\.\d+)", text, re.ASCII) or float(text) * 1024 < 1:
        raise LaunchError(
            f"launcher.slurm.mem_gb must be a number of gigabytes (mem_gb=32) but got '{text}'. Another unit: "
            "+launcher.slurm.mem=32000M."
        )
    return int(float(text) * 1024)


def _check_at_most(key: str, requested: Any, value: float, most: float, unit: str = "") -> None:
    """Raise LaunchError when ``value`` is above ``most``. ``requested``: the value as the user wrote it."""
    if value > most:
        raise LaunchError(f"launcher.slurm.{key} must be at most {most:g}{unit}, the largest node's, but got {requested}.")


def _time_limit(requested_min: int | None, kinds: list[NodeKind]) -> int:
    """Minutes: the requested ones, else four hours or the partition's limit, whichever is less."""
    limits = [kind.max_min for kind in kinds]
    max_min = None if None in limits else max(limit for limit in limits if limit is not None)
    if requested_min is None:
        return max(1, min(DEFAULT_MIN, max_min)) if max_min is not None else DEFAULT_MIN
    if max_min is not None and requested_min > max_min:
        names = ", ".join(f"{kind.partition} {kind.max_min} min" for kind in kinds)
        raise LaunchError(f"launcher.timeout_min must be at most the partition's limit ({names}) but got {requested_min}.")
    return requested_min


def _resources(flags: dict[str, Any], kinds: list[NodeKind]) -> dict[str, Any]:
    """GPUs, cores and memory. By default one GPU where the nodes have any, with its share of the cores and memory."""
    resources: dict[str, Any] = {}
    share = max(kinds, key=lambda kind: kind.gpus)
    parts = max(1, share.gpus)
    if share.gpus and not _sets_gpus(flags):
        resources["gpus_per_node"] = 1
    if "array_parallelism" in flags:
        resources["array_parallelism"] = _whole_number("array_parallelism", flags)
    most_cpus, most_mb = max(kind.cpus for kind in kinds), max(kind.memory_mb for kind in kinds)
    if "cpus_per_task" in flags:
        resources["cpus_per_task"] = _whole_number("cpus_per_task", flags)
        _check_at_most("cpus_per_task", flags["cpus_per_task"], resources["cpus_per_task"], most_cpus)
    elif "cpus_per_gpu" not in flags:
        resources["cpus_per_task"] = max(1, min(DEFAULT_CPUS, share.cpus // parts))
    if "mem_gb" in flags:
        memory_mb = _memory_mb(flags)
        _check_at_most("mem_gb", flags.pop("mem_gb"), memory_mb / 1024, most_mb / 1024, " GB")
        resources["mem"] = f"{memory_mb}MB"
    elif not {"mem", "mem_per_cpu", "mem_per_gpu"} & set(flags) and share.memory_mb > 1:
        resources["mem"] = f"{min(DEFAULT_MEM_GB * 1024, share.memory_mb // parts)}MB"
    return resources
