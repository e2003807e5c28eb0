"""Checks before any trial is dispatched: the disk, and in a separate process the model, SAEs and data."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from isaerft_sweep.errors import FolderError, LaunchError, ModelError
from isaerft_sweep.guard import of_process
from isaerft_sweep.journal.atomic_files import read_json, write_json
from isaerft_sweep.paths import PACKAGE, cache_folder
from isaerft_sweep.preferences import PROGRESS, check_files
from isaerft_sweep.provenance import versions
from isaerft_sweep.sae_folder import check_sae_folder
from isaerft_sweep.spec_fields import canonical_json, to_dict
from isaerft_sweep.specs import Experiment, expanded

VALID_S = 3600.0
"""How long a check is valid: the content of the Hub's cache may change unnoticed, local files and versions may not."""
PATH_OPTIONS = ("name", "tokenizer", "path", "eval_path", "sae_path")
"""Options that may name a local file or folder."""
ORPO_OPTIONS = ("optimizer", "max_length")
"""Options of ``orpo`` that the check reads."""
ENVIRONMENT = ("HF_", "TRANSFORMERS_", "CUDA_", "HOME", "XDG_", "PATH", "CC", "CXX")
"""Prefixes of the variables that locate models, data and compilers."""


def check_disk(folder: Path, min_free_gb: float) -> None:
    """Raise FolderError unless the folder's disk has room."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        free_gb = shutil.disk_usage(existing).free / 1e9
    except OSError as error:
        raise FolderError(f"the output folder {folder} cannot be used: {error.strerror}.") from error
    if free_gb < min_free_gb:
        raise FolderError(
            f"the disk of {folder} must have {min_free_gb:g} GB free (launcher.min_free_gb) but has {free_gb:.2f} GB. "
            "Make room, or choose another disk: output=PATH."
        )


def check_trial_needs(*experiments: Experiment) -> dict[str, Any]:
    """Read model, SAEs and data of each as a trial does; a summary of the first: ``model``, ``saes``, ``data``, ``more``.

    Raises ModelError when anything is missing, DataError when it is a data file.
    """
    check_local_files(*experiments)
    command = [sys.executable, "-c", "from isaerft_sweep.dispatch.job import check_needs; raise SystemExit(check_needs())"]
    done = _run(command, canonical_json([to_dict(e) for e in experiments]))
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise LaunchError(f"the check of model, SAE and data {of_process(done)}") from error
    if "error" in result:
        raise ModelError(result["error"])
    summary: dict[str, Any] = result["ok"]
    return summary


def _run(command: list[str], stdin: str) -> subprocess.CompletedProcess[str]:
    """Like ``subprocess.run``, but prints the process's lines about its progress at once."""
    stderr_lines: list[str] = []

    def follow(stream: Iterable[str]) -> None:
        for line in stream:
            stderr_lines.append(line)
            if line.startswith(PROGRESS):
                print(line.removeprefix(PROGRESS), end="", file=sys.stderr, flush=True)

    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        reader = Thread(target=follow, args=(process.stderr,), daemon=True)
        reader.start()
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(stdin)
                process.stdin.close()
            output = process.stdout.read()
        except BaseException:  # Ctrl-C
            process.kill()
            raise
        reader.join()
    return subprocess.CompletedProcess(command, process.returncode, output, "".join(stderr_lines))


def check_local_files(*experiments: Experiment) -> None:
    """Raise DataError or ModelError for missing or broken local files, before anything slow is loaded."""
    for data in {experiment.data: None for experiment in experiments}:
        check_files(data)
    for path in {site.sae_path: None for experiment in experiments for site in experiment.adapter.sites if site.sae_path}:
        check_sae_folder(str(path))


def known_trial_needs(*experiments: Experiment) -> dict[str, Any]:
    """``check_trial_needs``, or its cached result of the last hour when nothing has changed.

    The check takes ten seconds: with the cache a sweep that is resumed, attached to, or run by many agents starts at once.
    """
    folder = cache_folder(experiments[0].cache) / "checked"
    path = folder / f"{hashlib.sha256(''.join(map(_inputs_hash, experiments)).encode()).hexdigest()[:32]}.json"
    try:
        cached = read_json(path)
        if cached and 0 <= time.time() - cached["time"] < VALID_S:
            summary: dict[str, Any] = cached["facts"]
            return summary
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a damaged file, or another version's: check again
    summary = check_trial_needs(*experiments)
    with suppress(OSError):  # without a writable cache only time is lost
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.json"):
            if time.time() - old.stat().st_mtime > VALID_S:
                old.unlink(missing_ok=True)
        write_json(path, {"time": time.time(), "facts": summary})
    return summary


def _inputs_hash(experiment: Experiment) -> str:
    """A hash of everything that decides the check's outcome; of files only names, sizes and times."""
    sections = {name: to_dict(getattr(experiment, name)) for name in ("model", "data", "adapter")}
    orpo = to_dict(experiment.orpo)
    specs = [sections["model"], sections["data"], *sections["adapter"]["sites"]]
    paths = [str(spec[option]) for spec in specs for option in PATH_OPTIONS if spec.get(option)]
    content = [
        {**sections, "compile": experiment.launcher.compile},
        {name: orpo[name] for name in ORPO_OPTIONS},
        [stat for path in paths for stat in _file_stats(expanded(path).absolute())],
        [stat for stat in _file_stats(PACKAGE) if stat[0].endswith(".py")],
        sorted((k, v) for k, v in os.environ.items() if k.startswith(ENVIRONMENT)),
        [platform.node(), sys.executable, versions()],
    ]
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:32]


def _file_stats(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size in bytes and modification time in ns of a file, or of every file in a folder."""
    with suppress(OSError):  # a name that no file can have
        for file in [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []:
            stat = file.stat()
            yield str(file), stat.st_size, stat.st_mtime_ns
