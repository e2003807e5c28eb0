"""Changes of artifacts by clients: create, commit, update, alias, use. ``payload`` is the input of the GraphQL mutation."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from isaerft_sweep.serve.artifacts import COMMITTED, PENDING, VERSION, collection_of
from isaerft_sweep.serve.caller import Caller
from isaerft_sweep.serve.checks import RequestError, checked_name


def create(caller: Caller, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Create an artifact, or return the one of the same collection with the same digest."""
    artifacts = caller.server.artifacts
    collection = payload.get("artifactCollectionName") or next(iter(payload.get("artifactCollectionNames") or ()), "")
    fields = {
        # `wandb sync` of an offline run sends no entity: the server's default applies
        "entity": checked_name("entity", payload["entityName"] or caller.server.entity),
        "project": checked_name("project", payload["projectName"] or "uncategorized"),
        "collection": collection,
        "type": payload["artifactTypeName"],
        "digest": payload["digest"],
        "digestAlgorithm": payload.get("digestAlgorithm"),
        "run": payload.get("runName"),
        "description": payload.get("description"),
        "metadata": payload.get("metadata"),
        "historyStep": payload.get("historyStep"),
        "aliases": list(_aliases(payload.get("aliases"))),
        "tags": [tag["tagName"] for tag in payload.get("tags") or ()],
        "state": PENDING,
    }
    _check_new(caller, fields)
    for artifact in artifacts.versions(collection_of(fields)):
        if artifact["digest"] == fields["digest"]:
            aliases = list(dict.fromkeys([*artifact["aliases"], *fields["aliases"]]))
            return caller.server.write_artifact(artifact["id"], aliases=aliases)
    return caller.server.write_artifact(f"artifact-{secrets.token_hex(8)}", **fields)


def _check_new(caller: Caller, fields: Mapping[str, Any]) -> None:
    name = fields["collection"]
    if not re.fullmatch(r"[\w.-]{1,128}", name):
        raise RequestError(f"an artifact's name must be of letters, digits, '_', '.', '-' but got {name[:140]!r}.")
    for alias in fields["aliases"]:
        if not alias or len(alias) > 128 or re.search(r"[:/]", alias) or VERSION.fullmatch(alias):
            raise RequestError(f"an alias must have no '/' and ':' and be no version like v3 but got {alias[:140]!r}.")
    for artifact in caller.server.artifacts.versions(collection_of(fields))[:1]:
        if artifact["type"] != fields["type"]:
            raise RequestError(
                f"the collection {name} has artifacts of type '{artifact['type']}' but got '{fields['type']}'. "
                "Choose another name."
            )


def _aliases(entries: Iterable[Mapping[str, Any]] | None) -> Iterator[str]:
    return (entry["alias"] for entry in entries or ())


def find(caller: Caller, artifact_id: str) -> dict[str, Any]:
    """Look up an artifact. Raises RequestError when there is none with that id."""
    artifact = caller.server.artifacts.get(artifact_id)
    if artifact is None:
        raise RequestError(f"there is no artifact {artifact_id[:80]} on this server.", 404)
    return artifact


def commit(caller: Caller, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Commit the artifact: all its files are uploaded."""
    find(caller, payload["artifactID"])
    return caller.server.write_artifact(payload["artifactID"], state=COMMITTED)


def update(caller: Caller, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Change description, metadata, aliases or tags."""
    artifact = find(caller, payload["artifactID"])
    fields: dict[str, Any] = {name: payload[name] for name in ("description", "metadata") if name in payload}
    if "aliases" in payload:
        fields["aliases"] = list(dict.fromkeys(_aliases(payload["aliases"])))
    added, removed = ([tag["tagName"] for tag in payload.get(name) or ()] for name in ("tagsToAdd", "tagsToDelete"))
    if added or removed:
        kept = [tag for tag in artifact.get("tags") or () if tag not in removed]
        fields["tags"] = list(dict.fromkeys([*kept, *added]))
    _check_new(caller, {**artifact, **fields})
    return caller.server.write_artifact(artifact["id"], **fields)


def change_aliases(caller: Caller, payload: Mapping[str, Any], add: bool) -> dict[str, Any]:
    """Add or remove aliases."""
    artifact = find(caller, payload["artifactID"])
    aliases = list(_aliases(payload["aliases"]))
    kept = [alias for alias in artifact["aliases"] if alias not in aliases]
    _check_new(caller, {**artifact, "aliases": aliases})
    caller.server.write_artifact(artifact["id"], aliases=[*kept, *aliases] if add else kept)
    return {"success": True}


def use(caller: Caller, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Record that a run uses the artifact as its input."""
    artifact = find(caller, payload["artifactID"])
    user = [payload["entityName"] or caller.server.entity, payload["projectName"] or "uncategorized", payload["runName"]]
    users = artifact.get("users") or []
    return artifact if user in users else caller.server.write_artifact(artifact["id"], users=[*users, user])


def new_manifest(caller: Caller, artifact_id: str, digest: str | None) -> dict[str, Any]:
    """Record a new manifest of the artifact. A manifest has the id of its artifact."""
    find(caller, artifact_id)
    return caller.server.write_artifact(artifact_id, manifest=digest, changed=time.time())
