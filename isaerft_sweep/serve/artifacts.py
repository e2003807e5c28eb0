"""Artifacts: versions of a project's collections, each with a manifest and files in a folder of its own.

A version gets its number when it is committed, and an alias belongs to the version that got it last.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isaerft_sweep.serve.checks import RequestError, checked_name

if TYPE_CHECKING:
    from isaerft_sweep.serve.caller import Caller

MANIFEST = "wandb_manifest.json"
PENDING, COMMITTED = "PENDING", "COMMITTED"
VERSION = re.compile(r"v(\d{1,9})")
Collection = tuple[str, str, str]
"""Entity, project and name."""


class Artifacts(dict[str, dict[str, Any]]):
    """What is known of each artifact, by its id; ``folder`` holds their files."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.collections: dict[Collection, list[str]] = {}
        """The committed versions' ids, in order."""

    def note(self, artifact_id: str, facts: Mapping[str, Any], at: float) -> None:
        """Take in an event."""
        known = self.setdefault(artifact_id, {"id": artifact_id, "created": at})
        known.update(facts, updated=at)
        if known.get("state") != COMMITTED:
            return
        versions = self.collections.setdefault(collection_of(known), [])
        if artifact_id not in versions:
            versions.append(artifact_id)
        if "aliases" in facts or "state" in facts:
            for other in versions:
                if other != artifact_id:
                    kept = [alias for alias in self[other]["aliases"] if alias not in known["aliases"]]
                    self[other]["aliases"] = kept

    def versions(self, collection: Collection) -> list[dict[str, Any]]:
        return [self[artifact_id] for artifact_id in self.collections.get(collection, ())]

    def version_of(self, known: Mapping[str, Any]) -> int | None:
        """The number of a committed version."""
        versions = self.collections.get(collection_of(known), [])
        return versions.index(known["id"]) if known["id"] in versions else None

    def named(self, collection: Collection, alias: str) -> dict[str, Any] | None:
        """The version ``v3``, or the one with an alias."""
        versions = self.versions(collection)
        number = VERSION.fullmatch(alias)
        if number and int(number[1]) < len(versions):
            return versions[int(number[1])]
        return next((known for known in versions if alias in known["aliases"]), None)

    def place(self, artifact_id: str, name: str) -> Path:
        """Where a file of the artifact lies."""
        return self.folder / artifact_id / "files" / name.lstrip("/")

    def manifest(self, artifact_id: str) -> dict[str, dict[str, Any]]:
        """The artifact's entries by name: ``digest``, ``size``, and ``ref`` of what lies elsewhere."""
        if artifact_id not in self:
            return {}
        path = self.folder / artifact_id / MANIFEST
        try:
            return _contents(path, path.stat().st_mtime_ns)
        except OSError:
            return {}

    def path_of(self, artifact_id: str, name: str, entry: Mapping[str, Any]) -> Path | None:
        """A file of the artifact, which may have been uploaded with an older version; None when there is none."""
        for owner in (artifact_id, str(entry.get("birthArtifactID", ""))):
            path = self.place(owner, name)
            if owner in self and ".." not in Path(name).parts and path.is_file():
                return path
        return None

    def by_digest(self, artifact_id: str, digest: str) -> Path | None:
        """The file of a digest (base64 of an MD5)."""
        for name, entry in self.manifest(artifact_id).items():
            if entry.get("digest") == digest:
                return self.path_of(artifact_id, name, entry)
        return None


@lru_cache(maxsize=64)
def _contents(path: Path, _changed: int) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("contents")
    except (ValueError, AttributeError, RecursionError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, dict)}


def collection_of(known: Mapping[str, Any]) -> Collection:
    """Where an artifact belongs."""
    return known["entity"], known["project"], known["collection"]


def split_name(name: str) -> tuple[str, str]:
    """Collection and alias of ``NAME`` or ``NAME:ALIAS``."""
    collection, _, alias = name.rpartition("/")[2].partition(":")
    return collection, alias or "latest"


# -- what clients change


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
