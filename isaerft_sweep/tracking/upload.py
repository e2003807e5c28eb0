"""``isaerft-sweep sync``: uploads finished runs to another W&B server, with their sweep and run ids.

`wandb sync` uploads offline runs directly. wandb first rewrites runs of ``isaerft-sweep serve`` as offline runs, one process
each.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isaerft_sweep.errors import FolderError, SyncError
from isaerft_sweep.journal.layout import TrialFolder

ATTEMPTS = 6
FIRST_WAIT_S = 2.0
ENDED = ("finished", "failed", "killed")
"""States of a run whose end was reported to the server; "crashed" means that it was not."""
PERMANENT = re.compile(
    r"(?:HTTP|status|code|error|response)\D{0,12}\b40[134]\b|\b40[134] (?:client|unauth|forbid|not f)"
    r"|not valid|invalid|permission",
    re.IGNORECASE,
)
"""wandb's messages for errors that a retry cannot fix."""
WRITER, REPORTER = "isaerft_sweep.tracking.rewrite", "isaerft_sweep.tracking.late_report"
RUN = """query Run($entity: String!, $project: String!, $name: String!) {
  project(name: $project, entityName: $entity) { run(name: $name) { state historyLineCount } }
}"""
IMPORT = """mutation ImportSweep($name: String!, $entity: String!, $project: String!, $config: String!) {
  importSweep(input: {name: $name, entityName: $entity, projectName: $project, config: $config}) { sweep { id } }
}"""


@dataclass(frozen=True)
class Upload:
    """One run to upload: an offline run's folder, or the data to write one.

    ``served``: input of ``rewrite``. ``trial``: a trial's folder, whose run was online and has ``rows`` rows.
    """

    run_id: str
    sweep_id: str
    project: str
    folder: Path | None = None
    served: Mapping[str, Any] | None = None
    trial: Path | None = None
    rows: int = 0


@dataclass(frozen=True)
class Target:
    """The server to upload to. ``entity``: None means the entity of the key."""

    url: str
    key: str
    entity: str | None = None
    project: str | None = None


@dataclass
class Outcome:
    """Run ids by result. ``present``: the target already has the complete run. ``failed``: the reason by run id."""

    uploaded: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def target_from(environment: Mapping[str, str], url: str | None, entity: str | None, project: str | None) -> Target:
    """The target from the command's options and wandb's environment variables. Raises SyncError without a key.

    Args:
        environment: has WANDB_API_KEY, and the defaults of ``url`` and ``entity``.
        url: the server.
        entity: the owner of the runs.
        project: None: each run's own.
    """
    key = environment.get("WANDB_API_KEY", "")
    if not key:
        raise SyncError("the target's key must be in WANDB_API_KEY, but it is not set.")
    address = url or environment.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    if not re.fullmatch(r"https?://[^\s/?#]+(/\S*)?", address):
        raise SyncError(f"the target must be an address like http://HOST:8090 but got '{address}'. Set it with --to URL.")
    return Target(address.rstrip("/"), key, entity or environment.get("WANDB_ENTITY"), project)


def offline_runs(folder: Path) -> list[Upload]:
    """The runs of trials below ``folder`` that W&B may lack: offline ones not uploaded yet, and online ones."""
    uploads = []
    specs = [_read_spec(spec) for spec in folder.rglob("spec.json")]
    for _, _, trial, ids in sorted(specs):
        for path in sorted(trial.glob("wandb/wandb/offline-run-*")):
            if any(path.glob("run-*.wandb")) and not any(path.glob("*.synced")):
                uploads.append(Upload(*ids, folder=path))
        if any(trial.glob("wandb/wandb/run-*")) and not any(trial.glob("wandb/wandb/offline-run-*/run-*.wandb")):
            rows = len({row["step"] for row in TrialFolder(trial).read_metrics()})  # W&B has one row per step
            uploads.append(Upload(*ids, trial=trial, rows=rows))
    return uploads


def _read_spec(spec: Path) -> tuple[Path, int, Path, tuple[str, str, str]]:
    """A trial's sort key (sweep folder, index), its folder, and its run's id, sweep and project. Raises SyncError."""
    try:
        content = json.loads(spec.read_text(encoding="utf-8"))
        ids = (str(content["run_id"]), str(content["sweep_id"]), str(content["experiment"]["tracker"]["project"]))
        return spec.parent.parent, int(content["index"]), spec.parent, ids
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SyncError(
            f"{spec} must be a trial's, but it cannot be read ({error!r}). Restore it or move it away."
        ) from error


def offline_uploads(folder: Path) -> tuple[list[Upload], dict[str, str]]:
    """The offline runs below ``folder``, and the text of their sweep files by sweep id."""
    uploads = offline_runs(folder)
    configs: dict[str, str] = {}
    for run in uploads:
        run_folder = run.folder or run.trial
        assert run_folder is not None
        file = next((p / "sweep.yaml" for p in run_folder.parents if (p / "sweep.yaml").is_file()), None)
        text = file.read_text(encoding="utf-8") if file else ""
        if text.strip() not in ("", "{}"):
            configs.setdefault(run.sweep_id, text)
    return uploads, configs


def upload(
    uploads: Sequence[Upload],
    configs: Mapping[str, str],
    target: Target,
    say: Callable[[str], None],
    wait_s: float = FIRST_WAIT_S,
) -> Outcome:
    """Upload runs one after another, with retries and backoff while the server does not answer.

    Args:
        uploads: the runs. One that fails does not stop the others.
        configs: the text of sweep files by sweep id, for a target that can import sweeps.
        target: the server.
        say: prints a line.
        wait_s: the first pause between retries; it doubles each time.
    """
    outcome = Outcome()
    announced: set[tuple[str, str]] = set()
    for run in uploads:
        sweep = (run.sweep_id, target.project or run.project)
        try:
            if run.sweep_id in configs and sweep not in announced:
                _retried(lambda run=run: _announce(run, configs[run.sweep_id], target), wait_s)  # type: ignore[misc]
                announced.add(sweep)
            if run.trial is not None and _has(run, target):
                outcome.present.append(run.run_id)
                continue
            _retried(lambda run=run: _sync(run, target), wait_s)  # type: ignore[misc]
        except SyncError as error:
            outcome.failed[run.run_id] = str(error)
            say(f"{run.run_id}: {error}")
            continue
        outcome.uploaded.append(run.run_id)
        location = f"{target.project or run.project}, sweep {run.sweep_id or 'none'}"
        say(f"{run.run_id}: uploaded to {target.url}, {location}")
    return outcome


def _retried(call: Callable[[], None], wait_s: float) -> None:
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Unreachable as error:
            if attempt == ATTEMPTS - 1:
                raise SyncError(str(error)) from error
            time.sleep(wait_s * 2**attempt)


class Unreachable(SyncError):
    """The server does not answer now; a retry may help."""


def _sync(run: Upload, target: Target) -> None:
    with tempfile.TemporaryDirectory(prefix="isaerft-sync-") as staging:
        folder = run.folder or _rewritten(run, Path(staging))
        command = [sys.executable, "-m", "wandb", "sync", "--include-online", "--project", target.project or run.project]
        command += ["--entity", target.entity] if target.entity else []
        done = subprocess.run(
            [*command, str(folder)],
            env=_environment(target),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    output = (done.stdout + done.stderr).strip()
    if done.returncode or "ERROR" in output:
        reason = next((line for line in output.splitlines() if "ERROR" in line or "Error" in line), output[-300:])
        raise _failure(reason or f"wandb sync ended with code {done.returncode}", target)


def _failure(reason: str, target: Target) -> SyncError:
    permanent = PERMANENT.search(reason)
    text = f"it could not be uploaded to {target.url}: {reason[:300]}"
    return SyncError(text) if permanent else Unreachable(text)


def _environment(target: Target) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**others, "WANDB_BASE_URL": target.url, "WANDB_API_KEY": target.key}


def _rewritten(run: Upload, staging: Path) -> Path:
    """Have wandb write an offline run below ``staging`` from a served run or a trial's folder; returns its folder."""
    command = [sys.executable, "-m", WRITER]
    if run.trial is not None:
        command = [sys.executable, "-m", REPORTER, str(run.trial.absolute()), str(staging)]
    content = json.dumps({**(run.served or {}), "folder": str(staging)})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(command, input=content, env=environment, capture_output=True, text=True, check=False)
    offline_run = next(iter(staging.glob("wandb/offline-run-*")), None)
    if done.returncode or offline_run is None:
        raise SyncError(f"it could not be written as an offline run: {done.stderr.strip()[-300:]}")
    return offline_run


def _has(run: Upload, target: Target) -> bool:
    """Whether the target has the complete run. Raises SyncError when it cannot answer."""
    variables = {"entity": target.entity or _entity(target), "project": target.project or run.project, "name": run.run_id}
    project = (_query(target, RUN, variables).get("data") or {}).get("project") or {}
    remote = project.get("run") or {}
    return remote.get("state") in ENDED and int(remote.get("historyLineCount") or 0) >= run.rows


def _announce(run: Upload, config: str, target: Target) -> None:
    """Import the sweep into the target if it can: ``isaerft-sweep serve`` does, W&B's own servers do not."""
    variables = {
        "name": run.sweep_id,
        "entity": target.entity or _entity(target),
        "project": target.project or run.project,
        "config": config,
    }
    answer = _query(target, IMPORT, variables)
    errors = [str(error.get("message")) for error in answer.get("errors") or ()]
    if errors and not any("importSweep" in error for error in errors):
        raise SyncError(f"the sweep {run.sweep_id} could not be imported into {target.url}: {errors[0]}")


def _entity(target: Target) -> str:
    viewer = (_query(target, "query Viewer { viewer { entity } }", {}).get("data") or {}).get("viewer") or {}
    return str(viewer.get("entity") or "")


def _query(target: Target, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    key = base64.b64encode(f"api:{target.key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {key}"}
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(f"{target.url}/graphql", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            reply: dict[str, Any] = json.loads(answer.read())
            return reply
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise SyncError(f"{target.url} does not take the key in WANDB_API_KEY.") from error
        if error.code < 500 and error.code != 429:
            raise SyncError(f"{target.url} answers {error.code}.") from error
        raise Unreachable(f"{target.url} answers {error.code}.") from error
    except (OSError, ValueError) as error:
        raise Unreachable(f"{target.url} does not answer: {error}.") from error


def nothing_to_upload(source: Path) -> FolderError:
    """The error for a folder without runs."""
    return FolderError(
        f"'{source}' must be a sweep's folder with offline runs, or the data folder of `isaerft-sweep serve`, but no run "
        "in it is left to upload."
    )
