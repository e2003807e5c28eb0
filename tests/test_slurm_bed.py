"""The test bed itself: nothing of it outlives the process that started it, in whatever way that ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers import slurm_bed
from helpers.slurm_bed import Bed
from helpers.waiting import wait_for

pytestmark = pytest.mark.slow
SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from helpers.slurm_bed import running_bed
with running_bed(accounting=False) as bed:
    bed.command("sbatch", "--output=/dev/null", "--wrap", "exec sleep 600")
    while "RUNNING" not in bed.command("squeue", "-h", "-o", "%T"):
        time.sleep(0.1)
    print(bed.root, flush=True)
    time.sleep(600)
"""


def of_bed(root: str) -> list[psutil.Process]:
    """Daemons, steps and jobs of the bed in ``root``."""
    found = []
    for process in psutil.process_iter():
        try:
            named = root in " ".join([*process.cmdline(), *process.environ().values()])
            if named or slurm_bed.holds_file_below(process, Path(root)):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def test_kill_9_of_the_process_that_started_a_bed_ends_the_bed() -> None:
    if reason := slurm_bed.why_not():
        pytest.skip(reason)
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)]
    starter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    root = starter.stdout.readline().strip()
    assert len(of_bed(root)) >= 7, "munged, slurmctld, four slurmds and a job"
    starter.kill()
    starter.communicate()
    wait_for(lambda: not of_bed(root) and not Path(root).exists(), timeout_s=90)


def test_a_cluster_that_a_test_has_broken_is_mended_for_the_next(slurm: Bed) -> None:
    slurm.command("sbatch", "--output=/dev/null", "--array=0-9", "--wrap", "exec sleep 600")
    slurm.kill("n2")
    slurm.kill("slurmctld")
    slurm.clear()
    assert slurm.jobs() == [] and slurm.idle()
