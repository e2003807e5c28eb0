"""The checks of ``doctor`` on the machine where trials run: a job of the same launcher runs them."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import build_opener

from isaerft_sweep.config.boundary import to_definition, variants
from isaerft_sweep.controller.preflight import check_trial_needs
from isaerft_sweep.dispatch.job import prepare_process
from isaerft_sweep.errors import IsaerftError
from isaerft_sweep.journal.atomic_files import write_json
from isaerft_sweep.paths import cache_folder
from isaerft_sweep.spec_fields import from_mapping
from isaerft_sweep.specs import Experiment

GOOD, WARNING, BAD = "good", "warning", "bad"
MADE_BEFORE, LOCKED, ANSWER = "made-before", "locked", "answer.json"
"""Files in the probe's folder: one that the command writes, one that it locks, and the job's findings."""
CONNECT_S = 10.0
BY_PROXY = (407, 502, 503, 504)
"""Status codes of a proxy that refuses the request or cannot reach the server."""


@dataclass(frozen=True)
class Finding:
    """The result of one check; ``remedy``: what to do when it is not good."""

    what: str
    state: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class ProbeJob:
    """A picklable callable like those in ``dispatch/job.py``; ``experiment`` is JSON."""

    folder: str
    experiment: str
    threads: int | None
    device: str | None = None
    limit_s: float | None = None

    def __call__(self) -> str:
        prepare_process(self.threads, self.device)
        examine(Path(self.folder), from_mapping(Experiment, json.loads(self.experiment), ""))
        return "probed"


def examine(folder: Path, experiment: Experiment) -> None:
    """Run every check of this machine and write the findings into ``folder``."""
    findings = [
        Finding("job", GOOD, f"ran on {socket.gethostname()} with Python {platform.python_version()} ({sys.executable})"),
        gpus(),
        *shared_folder(folder),
        scratch(experiment),
        needs(experiment),
        wandb_server(experiment),
    ]
    clock_file = folder / "clock"
    clock_file.touch()
    skew_s = time.time() - clock_file.stat().st_mtime
    write_json(folder / ANSWER, {"findings": [asdict(finding) for finding in findings], "ahead_of_disk_s": skew_s})


def gpus() -> Finding:
    """The GPUs that torch sees, and whether it misses those allocated to the job."""
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        return Finding("GPU", GOOD, f"{names}; CUDA {torch.version.cuda}, {bf16}, torch {torch.__version__}")
    allocated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allocated and allocated != "NoDevFiles":
        text = f"the job has GPU {allocated}, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees none"
        remedy = "Install a CUDA build of torch that the driver supports, or load CUDA in launcher.slurm.setup."
        return Finding("GPU", BAD, text, remedy)
    return Finding("GPU", WARNING, "none: trials run on the CPU", "Request one: launcher.slurm.gpus_per_node=1.")


def shared_folder(folder: Path) -> list[Finding]:
    """Whether the output folder is shared, with renames, exclusive links and locks that work between machines."""
    if not (folder / MADE_BEFORE).is_file():
        remedy = "Choose a folder that all nodes share: output=PATH."
        return [Finding("shared folder", BAD, f"{folder} lacks the file that was written before the job", remedy)]

    def rename() -> bool:
        (folder / "aside").write_text("x", encoding="utf-8")
        os.replace(folder / "aside", folder / "renamed")
        return (folder / "renamed").read_text(encoding="utf-8") == "x"

    def link() -> bool:
        os.link(folder / "renamed", folder / "linked")
        try:
            os.link(folder / "renamed", folder / "linked")
        except FileExistsError:
            return True
        return False

    def lock() -> bool:
        with (folder / LOCKED).open("a", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    return [
        run_check("rename", rename, "files are replaced atomically", "Choose another disk: output=PATH."),
        run_check("exclusive link", link, "each task goes to one worker", "Choose a disk with hard links: output=PATH."),
        run_check(
            "file lock", lock, "held by the command, seen by the job",
            "Never run two controllers of one sweep, or have the disk mounted with locks (NFS: not `nolock`).",
        ),
    ]  # fmt: skip


def run_check(what: str, check: Callable[[], bool], text: str, remedy: str) -> Finding:
    """Run a check that may raise OSError.

    Args:
        what: the checked thing.
        check: returns whether it works.
        text: the finding's text when it works.
        remedy: what to do when it does not.
    """
    try:
        works, reason = check(), "it does not work"
    except OSError as error:
        works, reason = False, str(error)
    return Finding(what, GOOD, text) if works else Finding(what, BAD, reason, remedy)


def scratch(experiment: Experiment) -> Finding:
    """Disk space for the activation cache."""
    launcher = experiment.launcher
    scratch_folder = Path(launcher.scratch).expanduser() if launcher.scratch else cache_folder(experiment.cache)
    try:
        scratch_folder.mkdir(parents=True, exist_ok=True)
        free_gb = shutil.disk_usage(scratch_folder).free / 1e9
    except OSError as error:
        return Finding(
            "scratch", BAD, f"{scratch_folder}: {error}", "Choose another: launcher.scratch=PATH, best a local disk."
        )
    text = f"{scratch_folder}: {free_gb:.0f} GB free, launcher.activation_cache_gb={launcher.activation_cache_gb:g}"
    if free_gb < launcher.activation_cache_gb:
        return Finding("scratch", WARNING, text, "Choose a disk with more room: launcher.scratch=PATH.")
    return Finding("scratch", GOOD, text)


def needs(experiment: Experiment) -> Finding:
    """Whether model, SAE and data are available offline."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    try:
        resources = check_trial_needs(*variants(experiment, to_definition(experiment.sweep, experiment)))
    except IsaerftError as error:
        remedy = "On the login node, with the same overrides: isaerft-sweep fetch …"
        return Finding("model, SAE, data", BAD, str(error), remedy)
    return Finding(
        "model, SAE, data", GOOD, f"in the cache: {resources['model']}; {', '.join(resources['saes'])}; {resources['data']}"
    )


def wandb_server(experiment: Experiment) -> Finding:
    """Whether the trials' machine can reach W&B, if they need it."""
    if experiment.tracker.mode != "wandb":
        return Finding("W&B", GOOD, f"not needed: tracker={experiment.tracker.mode}")
    address = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    try:
        # through the proxy in the environment, as W&B's client
        build_opener().open(address, timeout=CONNECT_S).close()
    except (OSError, ValueError, HTTPException) as error:
        # any HTTP status of the server will do, but not a proxy's error
        if not isinstance(error, HTTPError) or error.code in BY_PROXY:
            remedy = (
                "Name the site's proxy, if it has one, in launcher.slurm.setup (export HTTPS_PROXY=…). Or use "
                "tracker=offline, and upload from the login node: isaerft-sweep sync outputs/NAME"
            )
            return Finding("W&B", BAD, f"{address} cannot be reached from here: {error}", remedy)
    return Finding("W&B", GOOD, f"{address} can be reached")
