"""What clients change about artifacts: create, commit, name, use."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from isaerft_sweep.serve.artifacts import (
    COMMITTED,
    PENDING,
    VERSION,
    collection_of,
)
from isaerft_sweep.serve.caller import Caller
from isaerft_sweep.serve.checks import RequestError, checked_name


def create(caller: Caller, given: Mapping[str, Any]) -> dict[str, Any]:
    """A new artifact, or the one of the same collection and digest that is there already."""
    artifacts = caller.server.artifacts
    collection = given.get("artifactCollectionName") or next(iter(given.get("artifactCollectionNames") or ()), "")
    facts = {
        # `wandb sync` of an offline run knows no entity: then it is the key's own
        "entity": checked_name("entity", given["entityName"] or caller.server.entity),
        "project": checked_name("project", given["projectName"] or "uncategorized"),
        "collection": collection,
        "type": given["artifactTypeName"],
        "digest": given["digest"],
        "digestAlgorithm": given.get("digestAlgorithm"),
        "run": given.get("runName"),
        "description": given.get("description"),
        "metadata": given.get("metadata"),
        "historyStep": given.get("historyStep"),
        "aliases": list(_aliases(given.get("aliases"))),
        "tags": [tag["tagName"] for tag in given.get("tags") or ()],
        "state": PENDING,
    }
    _check_new(caller, facts)
    for known in artifacts.versions(collection_of(facts)):
        if known["digest"] == facts["digest"]:
            aliases = list(dict.fromkeys([*known["aliases"], *facts["aliases"]]))
            return caller.server.note_artifact(known["id"], aliases=aliases)
    return caller.server.note_artifact(f"artifact-{secrets.token_hex(8)}", **facts)


def _check_new(caller: Caller, facts: Mapping[str, Any]) -> None:
    name = facts["collection"]
    if not re.fullmatch(r"[\w.-]{1,128}", name):
        raise RequestError(
            f"an artifact's name must be of letters, digits, '_', '.', '-' but got {facts['collection'][:140]!r}."
        )
    for alias in facts["aliases"]:
        if not alias or len(alias) > 128 or re.search(r"[:/]", alias) or VERSION.fullmatch(alias):
            raise RequestError(f"an alias must have no '/' and ':' and be no version like v3 but got {alias[:140]!r}.")
    for known in caller.server.artifacts.versions(collection_of(facts))[:1]:
        if known["type"] != facts["type"]:
            raise RequestError(
                f"the collection {facts['collection']} has artifacts of type '{known['type']}' but got '{facts['type']}'. "
                "Choose another name."
            )


def _aliases(given: Iterable[Mapping[str, Any]] | None) -> Iterator[str]:
    return (alias["alias"] for alias in given or ())


def find(caller: Caller, artifact_id: str) -> dict[str, Any]:
    """Raises RequestError when there is none of that id."""
    known = caller.server.artifacts.get(artifact_id)
    if known is None:
        raise RequestError(f"there is no artifact {artifact_id[:80]} on this server.", 404)
    return known


def commit(caller: Caller, given: Mapping[str, Any]) -> dict[str, Any]:
    """The artifact is whole."""
    find(caller, given["artifactID"])
    return caller.server.note_artifact(given["artifactID"], state=COMMITTED)


def update(caller: Caller, given: Mapping[str, Any]) -> dict[str, Any]:
    """Another description, metadata, aliases or tags."""
    known = find(caller, given["artifactID"])
    facts: dict[str, Any] = {name: given[name] for name in ("description", "metadata") if name in given}
    if "aliases" in given:
        facts["aliases"] = list(dict.fromkeys(_aliases(given["aliases"])))
    added, removed = ([tag["tagName"] for tag in given.get(name) or ()] for name in ("tagsToAdd", "tagsToDelete"))
    if added or removed:
        kept = [tag for tag in known.get("tags") or () if tag not in removed]
        facts["tags"] = list(dict.fromkeys([*kept, *added]))
    _check_new(caller, {**known, **facts})
    return caller.server.note_artifact(known["id"], **facts)


def change_aliases(caller: Caller, given: Mapping[str, Any], add: bool) -> dict[str, Any]:
    """More or fewer aliases."""
    known = find(caller, given["artifactID"])
    named = list(_aliases(given["aliases"]))
    kept = [alias for alias in known["aliases"] if alias not in named]
    _check_new(caller, {**known, "aliases": named})
    caller.server.note_artifact(known["id"], aliases=[*kept, *named] if add else kept)
    return {"success": True}


def use(caller: Caller, given: Mapping[str, Any]) -> dict[str, Any]:
    """A run takes the artifact as its input."""
    known = find(caller, given["artifactID"])
    user = [given["entityName"] or caller.server.entity, given["projectName"] or "uncategorized", given["runName"]]
    users = known.get("users") or []
    return known if user in users else caller.server.note_artifact(known["id"], users=[*users, user])


def new_manifest(caller: Caller, artifact_id: str, digest: str | None) -> dict[str, Any]:
    """The artifact's list of files has changed. A manifest's id is the artifact's."""
    find(caller, artifact_id)
    return caller.server.note_artifact(artifact_id, manifest=digest, changed=time.time())
