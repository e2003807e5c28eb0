"""``isaerft-sweep sync``: hands finished runs on to another W&B server, with their sweep and run ids.

Offline runs are uploaded as they are. Runs of ``isaerft-sweep serve`` are first written as offline runs by wandb itself, one
process each, then uploaded the same way: `wandb sync` does the talking in both cases.
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
"""States of a run whose end the server has heard: "crashed" says that it has not."""
LASTING = re.compile(
    r"(?:HTTP|status|code|error|response)\D{0,12}\b40[134]\b|\b40[134] (?:client|unauth|forbid|not f)"
    r"|not valid|invalid|permission",
    re.IGNORECASE,
)
"""What no second try would change, in wandb's words."""
WRITER, REPORTER = "isaerft_sweep.tracking.rewrite", "isaerft_sweep.tracking.late_report"
RUN = """query Run($entity: String!, $project: String!, $name: String!) {
  project(name: $project, entityName: $entity) { run(name: $name) { state historyLineCount } }
}"""
IMPORT = """mutation ImportSweep($name: String!, $entity: String!, $project: String!, $config: String!) {
  importSweep(input: {name: $name, entityName: $entity, projectName: $project, config: $config}) { sweep { id } }
}"""


@dataclass(frozen=True)
class Upload:
    """One run to upload: a folder that `wandb sync` takes, or what one is made of.

    ``served``: what ``rewrite`` takes. ``trial``: a trial's folder, whose run went online and has ``rows`` rows.
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
    """Where runs go. ``entity`` None: the key's own."""

    url: str
    key: str
    entity: str | None = None
    project: str | None = None


@dataclass
class Outcome:
    """``there``: runs that the target has already, whole. ``failed``: why, by run id."""

    uploaded: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def target_from(environment: Mapping[str, str], url: str | None, entity: str | None, project: str | None) -> Target:
    """The target that the options and wandb's own settings name. Raises SyncError without a key."""
    key = environment.get("WANDB_API_KEY", "")
    if not key:
        raise SyncError("the target's key must be in WANDB_API_KEY, but it is not set.")
    address = url or environment.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    if not re.fullmatch(r"https?://[^\s/?#]+(/\S*)?", address):
        raise SyncError(f"the target must be an address like http://HOST:8090 but got '{address}'. Give one: --to URL.")
    return Target(address.rstrip("/"), key, entity or environment.get("WANDB_ENTITY"), project)


def offline_runs(folder: Path) -> list[Upload]:
    """The runs of the trials below ``folder`` that W&B may not have: offline ones not uploaded, and online ones."""
    found = []
    specs = [_read_spec(spec) for spec in folder.rglob("spec.json")]
    for _, _, trial, ids in sorted(specs):
        for path in sorted(trial.glob("wandb/wandb/offline-run-*")):
            if any(path.glob("run-*.wandb")) and not any(path.glob("*.synced")):
                found.append(Upload(*ids, folder=path))
        if any(trial.glob("wandb/wandb/run-*")) and not any(trial.glob("wandb/wandb/offline-run-*/run-*.wandb")):
            rows = len({row["step"] for row in TrialFolder(trial).read_metrics()})  # W&B has one row a step
            found.append(Upload(*ids, trial=trial, rows=rows))
    return found


def _read_spec(spec: Path) -> tuple[Path, int, Path, tuple[str, str, str]]:
    """A trial's place in the order of uploads, its folder, and its run's id, sweep and project. Raises SyncError."""
    try:
        told = json.loads(spec.read_text(encoding="utf-8"))
        ids = (str(told["run_id"]), str(told["sweep_id"]), str(told["experiment"]["tracker"]["project"]))
        return spec.parent.parent, int(told["index"]), spec.parent, ids
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SyncError(
            f"{spec} must be a trial's, but it cannot be read ({error!r}). Restore it or move it away."
        ) from error


def offline_uploads(folder: Path) -> tuple[list[Upload], dict[str, str]]:
    """The offline runs below ``folder``, and their sweeps' files by id."""
    found = offline_runs(folder)
    configs: dict[str, str] = {}
    for one in found:
        place = one.folder or one.trial
        assert place is not None
        file = next((p / "sweep.yaml" for p in place.parents if (p / "sweep.yaml").is_file()), None)
        text = file.read_text(encoding="utf-8") if file else ""
        if text.strip() not in ("", "{}"):
            configs.setdefault(one.sweep_id, text)
    return found, configs


def upload(
    uploads: Sequence[Upload],
    configs: Mapping[str, str],
    target: Target,
    say: Callable[[str], None],
    wait_s: float = FIRST_WAIT_S,
) -> Outcome:
    """Upload runs one after another; each is tried again with growing pauses while the server does not answer.

    ``configs``: the sweeps' files by id, for a target that takes them. A run that fails does not hold up the others.
    """
    outcome = Outcome()
    announced: set[tuple[str, str]] = set()
    for one in uploads:
        place = (one.sweep_id, target.project or one.project)
        try:
            if one.sweep_id in configs and place not in announced:
                _retried(lambda one=one: _announce(one, configs[one.sweep_id], target), wait_s)  # type: ignore[misc]
                announced.add(place)
            if one.trial is not None and _has(one, target):
                outcome.there.append(one.run_id)
                continue
            _retried(lambda one=one: _sync(one, target), wait_s)  # type: ignore[misc]
        except SyncError as error:
            outcome.failed[one.run_id] = str(error)
            say(f"{one.run_id}: {error}")
            continue
        outcome.uploaded.append(one.run_id)
        where = f"{target.project or one.project}, sweep {one.sweep_id or 'none'}"
        say(f"{one.run_id}: uploaded to {target.url}, {where}")
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
    """The server does not answer now; it may later."""


def _sync(one: Upload, target: Target) -> None:
    with tempfile.TemporaryDirectory(prefix="isaerft-sync-") as aside:
        folder = one.folder or _rewritten(one, Path(aside))
        command = [sys.executable, "-m", "wandb", "sync", "--include-online", "--project", target.project or one.project]
        command += ["--entity", target.entity] if target.entity else []
        done = subprocess.run(
            [*command, str(folder)],
            env=_environment(target),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    said = (done.stdout + done.stderr).strip()
    if done.returncode or "ERROR" in said:
        reason = next((line for line in said.splitlines() if "ERROR" in line or "Error" in line), said[-300:])
        raise _failure(reason or f"wandb sync ended with code {done.returncode}", target)


def _failure(reason: str, target: Target) -> SyncError:
    lasting = LASTING.search(reason)
    text = f"it could not be uploaded to {target.url}: {reason[:300]}"
    return SyncError(text) if lasting else Unreachable(text)


def _environment(target: Target) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**kept, "WANDB_BASE_URL": target.url, "WANDB_API_KEY": target.key}


def _rewritten(one: Upload, aside: Path) -> Path:
    """An offline run that wandb writes from what a server or a trial's folder knows."""
    command = [sys.executable, "-m", WRITER]
    if one.trial is not None:
        command = [sys.executable, "-m", REPORTER, str(one.trial.absolute()), str(aside)]
    content = json.dumps({**(one.served or {}), "folder": str(aside)})
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(command, input=content, env=kept, capture_output=True, text=True, check=False)
    found = next(iter(aside.glob("wandb/offline-run-*")), None)
    if done.returncode or found is None:
        raise SyncError(f"it could not be written as an offline run: {done.stderr.strip()[-300:]}")
    return found


def _has(one: Upload, target: Target) -> bool:
    """Whether the target has the whole run. Raises SyncError when it cannot be asked."""
    place = {"entity": target.entity or _entity(target), "project": target.project or one.project, "name": one.run_id}
    project = (_ask(target, RUN, place).get("data") or {}).get("project") or {}
    run = project.get("run") or {}
    return run.get("state") in ENDED and int(run.get("historyLineCount") or 0) >= one.rows


def _announce(one: Upload, config: str, target: Target) -> None:
    """Tell the target of the sweep, where it takes that: another ``isaerft-sweep serve``. W&B's own servers do not."""
    variables = {
        "name": one.sweep_id,
        "entity": target.entity or _entity(target),
        "project": target.project or one.project,
        "config": config,
    }
    answer = _ask(target, IMPORT, variables)
    errors = [str(error.get("message")) for error in answer.get("errors") or ()]
    if errors and not any("importSweep" in error for error in errors):
        raise SyncError(f"the sweep {one.sweep_id} could not be made known to {target.url}: {errors[0]}")


def _entity(target: Target) -> str:
    viewer = (_ask(target, "query Viewer { viewer { entity } }", {}).get("data") or {}).get("viewer") or {}
    return str(viewer.get("entity") or "")


def _ask(target: Target, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    key = base64.b64encode(f"api:{target.key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {key}"}
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(f"{target.url}/graphql", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            found: dict[str, Any] = json.loads(answer.read())
            return found
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
        f"'{source}' must be a sweep's folder with offline runs, or the data folder of `isaerft-sweep serve`, but there is "
        "no run in it that waits for an upload."
    )
