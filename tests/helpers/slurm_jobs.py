"""Jobs on SLURM: small ones, counted calls, and a site whose commands answer as a test wants."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from conftest import TINY

from helpers import slurm_bed
from helpers.sweeps import stepping
from isaerft_sweep.dispatch.slurm.cluster import (
    NodeKind,
    SlurmCluster,
    parse_gres,
)
from isaerft_sweep.dispatch.slurm.sbatch_flags import sbatch_parameters
from isaerft_sweep.specs import LauncherSpec

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # jobs cannot import tests

GPU = NodeKind("gpu", True, 64, 512_000, 2880, ("a100", "nvlink"), parse_gres("gpu:a100:4(S:0-1)"))


CPU = NodeKind("cpu", False, 128, 256_000, None, (), {})


SITE = SlurmCluster({"MaxArraySize": "1001"}, (GPU, CPU), ("lab", "other"), ("normal",))


@dataclasses.dataclass
class Note:
    """A job that leaves a mark."""

    path: str
    threads: int | None = None
    device: str | None = None
    limit_s: float | None = None

    def __call__(self) -> str:
        Path(self.path).touch()
        return "done"


def parameters(site: SlurmCluster = SITE, timeout_min: int | None = None, **slurm: Any) -> dict[str, Any]:
    return sbatch_parameters(LauncherSpec(kind="slurm", timeout_min=timeout_min, slurm=slurm), site, "s")


STEPS = 60


ONE = (
    *TINY, "launcher=slurm", "launcher.poll_s=0.3", "launcher.slots=1", "name=s", "sweep.run_cap=1", f"orpo.max_steps={STEPS}",
    "orpo.checkpoint_every_steps=10", "orpo.eval_fraction=0.5",
)  # fmt: skip


def past(sweep: Path, step: int, attempt: int = 1) -> Callable[[], list[dict[str, Any]]]:
    """A condition: a trial runs and has got past ``step``."""
    return lambda: [s for s in stepping(sweep) if s["step"] > step and s["attempt"] >= attempt]


def count_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str, delay_s: float = 0) -> Path:
    """Put wrappers around real commands first in PATH, which note every call and may take their time."""
    calls, folder = tmp_path / "calls", tmp_path / "bin"
    folder.mkdir()
    calls.touch()
    for name in names:
        real = slurm_bed.which(name)
        tag = "" if len(names) == 1 else f"{name} "
        (folder / name).write_text(f'#!/bin/bash\necho "{tag}$*" >>{calls}\nsleep {delay_s}\nexec {real} "$@"\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return calls


class Site:
    """Stands in for a site: commands that answer what ``says`` holds, and note how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        self.calls.touch()
        for name in ("squeue", "sinfo", "scontrol", "sacct", "sacctmgr", "sbatch", "scancel", "srun"):
            self.says(name, "")
            (folder / name).write_text(
                f'#!/bin/bash\necho "{name} $*" >>{self.calls}\n'
                f'env | grep -E "^(SQUEUE|SINFO|SACCT|SCONTROL|SCANCEL|SLURM)_" >>{self.calls}\ncat {folder}/{name}.out\n'
            )
            (folder / name).chmod(0o755)
        self.says("sinfo", "main|main*|4|8000|infinite|big|gpu:fake:2\n")
        self.says("scontrol", "ClusterName = bed\nMaxArraySize = 1001\n")
        self.says("sbatch", "Submitted batch job 7\n")

    def says(self, command: str, text: str) -> None:
        (self.folder / f"{command}.out").write_text(text)

    def lines(self, command: str) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if line.startswith(f"{command} ")]


TEMPLATES = Path(__file__).parents[2] / "slurm"


def sbatch(cwd: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Submit as a user does, from ``cwd``, with this interpreter's commands first unless told otherwise; the job's id."""
    environment = environment or {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["sbatch", "--parsable", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True).stdout.strip()
