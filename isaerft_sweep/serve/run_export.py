"""Prepares the runs in a data folder for upload to another server. Only reads: the server may be running."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from isaerft_sweep.serve.artifacts import COMMITTED
from isaerft_sweep.serve.runs import ServedRun
from isaerft_sweep.serve.server import Server
from isaerft_sweep.tracking.upload import Upload

OWN_FILES = ("config.yaml", "wandb-summary.json", "wandb-metadata.json", "requirements.txt", "output.log")
"""wandb writes these files for every run, so they are not uploaded."""


def is_data_folder(path: Path) -> bool:
    """Whether the folder is a data folder of ``isaerft-sweep serve``."""
    return (path / "server.jsonl").is_file() and (path / "keys.jsonl").is_file()


def served_uploads(folder: Path, sweep: str | None) -> tuple[list[Upload], dict[str, str]]:
    """The ended runs of a sweep, or of all when ``sweep`` is None, and the texts of all sweep files by sweep id."""
    server = Server(folder, "local", read_only=True)
    runs = [run for run in server.runs.values() if not run.active and sweep in (None, run.sweep)]
    configs = {stored.id: stored.config for stored in server.sweeps.values()}
    runs.sort(key=lambda run: run.created)
    return [Upload(run.key.name, run.sweep, run.key.project, served=_content(server, run)) for run in runs], configs


def _content(server: Server, run: ServedRun) -> dict[str, Any]:
    base = server.files_of(run)
    files = [path for path in base.rglob("*") if path.is_file() and path.relative_to(base).as_posix() not in OWN_FILES]
    return {
        "run_id": run.key.name,
        "sweep_id": run.sweep,
        "project": run.key.project,
        "name": run.metadata.get("displayName"),
        "group": run.metadata.get("groupName"),
        "job_type": run.metadata.get("jobType"),
        "tags": run.metadata.get("tags") or [],
        "notes": run.metadata.get("notes"),
        "config": {name: value for name, value in run.config_values().items() if name != "_wandb"},
        "summary": json.loads(run.summary),
        "rows": list(run.steps()),
        "files": [str(path) for path in files],
        "files_base": str(base),
        "artifacts": _artifacts(server, run),
        "exitcode": run.exitcode if run.exitcode is not None else 1,
    }


def _artifacts(server: Server, run: ServedRun) -> list[dict[str, Any]]:
    """The artifact versions that the run has logged, with the paths of their files by name."""
    exported = []
    for artifact_id, artifact in server.artifacts.items():
        if (artifact["entity"], artifact["project"], artifact["run"], artifact["state"]) == (*_key(run), COMMITTED):
            entries = server.artifacts.manifest(artifact_id)
            paths = {name: server.artifacts.path_of(artifact_id, name, entry) for name, entry in entries.items()}
            fields = {name: artifact.get(name) for name in ("type", "description", "aliases")}
            fields["metadata"] = json.loads(artifact.get("metadata") or "null")
            files = {name: str(path) for name, path in paths.items() if path is not None}
            exported.append({"name": artifact["collection"], **fields, "files": files})
    return exported


def _key(run: ServedRun) -> tuple[str, str, str]:
    return run.key.entity, run.key.project, run.key.name
