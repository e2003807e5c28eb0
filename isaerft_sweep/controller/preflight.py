"""What is checked before any trial is dispatched: the folder, the disk, and in a process of its own the trial's needs."""

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
from isaerft_sweep.specs import Experiment

GOOD_FOR_S = 3600.0
"""How long a check counts. What the Hub's cache holds can change under it, local files and versions cannot."""
PLACES = ("name", "tokenizer", "path", "eval_path", "sae_path")
"""Options that may name a local file or folder."""
READ = ("optimizer", "max_length")
"""What of ``orpo`` the check reads."""
ENVIRONMENT = ("HF_", "TRANSFORMERS_", "CUDA_", "HOME", "XDG_", "PATH", "CC", "CXX")
"""Beginnings of variables that say where models, data and compilers are."""


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
    """Model, SAEs and data of each, read as a trial will read them; facts about the first one's.

    Raises ModelError when anything is missing, DataError when it is a file of data.
    """
    check_local_files(*experiments)
    command = [sys.executable, "-c", "from isaerft_sweep.dispatch.job import check_needs; raise SystemExit(check_needs())"]
    done = _run(command, canonical_json([to_dict(e) for e in experiments]))
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise LaunchError(f"the check of model, SAE and data {of_process(done)}") from error
    if "error" in answer:
        raise ModelError(answer["error"])
    facts: dict[str, Any] = answer["ok"]
    return facts


def _run(command: list[str], given: str) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run``; what the process says of its progress is shown at once."""
    said: list[str] = []

    def follow(stream: Iterable[str]) -> None:
        for line in stream:
            said.append(line)
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
                process.stdin.write(given)
                process.stdin.close()
            answer = process.stdout.read()
        except BaseException:  # Ctrl-C
            process.kill()
            raise
        reader.join()
    return subprocess.CompletedProcess(command, process.returncode, answer, "".join(said))


def check_local_files(*experiments: Experiment) -> None:
    """Raise DataError or ModelError where a file can be seen to be missing or broken, before anything slow is loaded."""
    for data in {experiment.data: None for experiment in experiments}:
        check_files(data)
    for path in {site.sae_path: None for experiment in experiments for site in experiment.adapter.sites if site.sae_path}:
        check_sae_folder(str(path))


def known_trial_needs(*experiments: Experiment) -> dict[str, Any]:
    """``check_trial_needs``, or what it found within the last hour when nothing has changed: it takes ten seconds.

    So a sweep that is continued, attached to, or run by many agents starts at once.
    """
    folder = cache_folder(experiments[0].cache) / "checked"
    path = folder / f"{hashlib.sha256(''.join(map(_what_is_checked, experiments)).encode()).hexdigest()[:32]}.json"
    try:
        kept = read_json(path)
        if kept and 0 <= time.time() - kept["time"] < GOOD_FOR_S:
            found: dict[str, Any] = kept["facts"]
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass  # half a file, or another version's: the check itself will tell
    facts = check_trial_needs(*experiments)
    with suppress(OSError):  # a cache that cannot be written costs only the time
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.json"):
            if time.time() - old.stat().st_mtime > GOOD_FOR_S:
                old.unlink(missing_ok=True)
        write_json(path, {"time": time.time(), "facts": facts})
    return facts


def _what_is_checked(experiment: Experiment) -> str:
    """A hash of all that the outcome of the check depends on, as far as it can be seen without reading it."""
    sections = {name: to_dict(getattr(experiment, name)) for name in ("model", "data", "adapter")}
    orpo = to_dict(experiment.orpo)
    places = [sections["model"], sections["data"], *sections["adapter"]["sites"]]
    named = [str(place[option]) for place in places for option in PLACES if place.get(option)]
    content = [
        {**sections, "compile": experiment.launcher.compile},
        {name: orpo[name] for name in READ},
        [facts for name in named for facts in _files(Path(os.path.expanduser(name)).absolute())],  # noqa: PTH111 (~nobody)
        [facts for facts in _files(PACKAGE) if facts[0].endswith(".py")],
        sorted((k, v) for k, v in os.environ.items() if k.startswith(ENVIRONMENT)),
        [platform.node(), sys.executable, versions()],
    ]
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:32]


def _files(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of change of a file, or of every file in a folder."""
    with suppress(OSError):  # a name that no file can have
        for one in [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []:
            facts = one.stat()
            yield str(one), facts.st_size, facts.st_mtime_ns
