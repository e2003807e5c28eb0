"""Artifacts: versions of a project's collections, each with a manifest and files in a folder of its own.

A version gets its number when it is committed, and an alias belongs to the version that got it last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

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
