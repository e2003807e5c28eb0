"""Artifacts: as much as a run needs to log its adapter, files and manifest kept under the artifact's id."""

from __future__ import annotations

import secrets
from typing import Any

from isaerft_sweep.serve.caller import Caller
from isaerft_sweep.serve.checks import RequestError, checked_name

MANIFEST = "wandb_manifest.json"


def create(caller: Caller, given: dict[str, Any]) -> dict[str, Any]:
    """A new artifact, or the one of the same collection and digest that is there already."""
    collection = given.get("artifactCollectionName") or next(iter(given.get("artifactCollectionNames") or ()), "")
    facts = {
        "entity": checked_name("entity", given["entityName"]),
        "project": checked_name("project", given["projectName"]),
        "collection": collection,
        "type": given["artifactTypeName"],
        "digest": given["digest"],
        "run": given.get("runName"),
        "metadata": given.get("metadata"),
        "aliases": [alias["alias"] for alias in given.get("aliases") or ()],
        "state": "PENDING",
    }
    same = ("entity", "project", "collection", "digest")
    for artifact_id, known in caller.server.artifacts.items():
        if known["state"] == "COMMITTED" and all(known[name] == facts[name] for name in same):
            return _view(caller, artifact_id)
    artifact_id = f"artifact-{secrets.token_hex(8)}"
    caller.server.note_artifact(artifact_id, **facts)
    return _view(caller, artifact_id)


def create_manifest(caller: Caller, given: dict[str, Any]) -> dict[str, Any]:
    """Where the artifact's list of files is uploaded to."""
    find(caller, given["artifactID"])
    caller.server.note_artifact(given["artifactID"], manifest=given["digest"])
    return _manifest(caller, given["artifactID"])


def update_manifest(caller: Caller, given: dict[str, Any]) -> dict[str, Any]:
    """The manifest's final digest. Its id is the artifact's."""
    find(caller, given["artifactManifestID"])
    caller.server.note_artifact(given["artifactManifestID"], manifest=given.get("digest"))
    return _manifest(caller, given["artifactManifestID"])


def create_files(caller: Caller, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Addresses to upload an artifact's files to."""
    made = []
    for spec in given["artifactFiles"]:
        artifact_id = spec["artifactID"]
        view = find(caller, artifact_id)
        path = f"/uploads/artifacts/{artifact_id}/files/{spec['name']}"
        made.append(
            {
                "id": f"{artifact_id}/{spec['name']}",
                "name": spec["name"],
                "storagePath": f"{artifact_id}/files/{spec['name']}",
                "uploadUrl": caller.file_url(path, "PUT"),
                "uploadHeaders": [],
                "artifact": view,
            }
        )
    return made


def commit(caller: Caller, given: dict[str, Any]) -> dict[str, Any]:
    """The artifact is whole."""
    find(caller, given["artifactID"])
    caller.server.note_artifact(given["artifactID"], state="COMMITTED")
    return _view(caller, given["artifactID"])


def find(caller: Caller, artifact_id: str) -> dict[str, Any]:
    """Raises RequestError when there is none of that id."""
    if artifact_id not in caller.server.artifacts:
        raise RequestError(f"there is no artifact {artifact_id} on this server.", 404)
    return _view(caller, artifact_id)


def find_named(caller: Caller, key: tuple[str, str], name: str) -> dict[str, Any] | None:
    """The latest artifact of a project's collection ``NAME`` or ``NAME:ALIAS``; None when there is none."""
    collection, _, alias = name.rpartition("/")[2].partition(":")
    for artifact_id, known in reversed(list(caller.server.artifacts.items())):
        named = alias in ("", "latest", *known["aliases"])
        if (known["entity"], known["project"], known["collection"]) == (*key, collection) and named:
            return _view(caller, artifact_id)
    return None


def _view(caller: Caller, artifact_id: str) -> dict[str, Any]:
    known = caller.server.artifacts[artifact_id]
    sequence = {"id": known["collection"], "name": known["collection"], "latestArtifact": None}
    kind = {"id": known["type"], "name": known["type"]}
    facts = {"state": known["state"], "digest": known["digest"], "metadata": known["metadata"]}
    return {"id": artifact_id, **facts, "artifactType": kind, "artifactSequence": sequence}


def _manifest(caller: Caller, artifact_id: str) -> dict[str, Any]:
    url = caller.file_url(f"/uploads/artifacts/{artifact_id}/{MANIFEST}", "PUT")
    file = {"id": f"{artifact_id}/{MANIFEST}", "name": MANIFEST, "uploadUrl": url, "uploadHeaders": []}
    return {"id": artifact_id, "file": file}
