"""Artifacts: the versions in a project's collections, each with a manifest and a folder of files.

A version gets its number when it is committed. An alias belongs to the version that received it last.
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
    """The fields of each artifact, by its id. ``folder`` holds their files."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.collections: dict[Collection, list[str]] = {}
        """The ids of the committed versions, in order."""

    def apply(self, artifact_id: str, fields: Mapping[str, Any], time_s: float) -> None:
        """Apply an event of ``time_s``, seconds since the epoch."""
        artifact = self.setdefault(artifact_id, {"id": artifact_id, "created": time_s})
        artifact.update(fields, updated=time_s)
        if artifact.get("state") != COMMITTED:
            return
        versions = self.collections.setdefault(collection_of(artifact), [])
        if artifact_id not in versions:
            versions.append(artifact_id)
        if "aliases" in fields or "state" in fields:
            for other in versions:
                if other != artifact_id:
                    kept = [alias for alias in self[other]["aliases"] if alias not in artifact["aliases"]]
                    self[other]["aliases"] = kept

    def versions(self, collection: Collection) -> list[dict[str, Any]]:
        return [self[artifact_id] for artifact_id in self.collections.get(collection, ())]

    def version_of(self, artifact: Mapping[str, Any]) -> int | None:
        """The number of a committed version; None for a draft."""
        versions = self.collections.get(collection_of(artifact), [])
        return versions.index(artifact["id"]) if artifact["id"] in versions else None

    def named(self, collection: Collection, alias: str) -> dict[str, Any] | None:
        """The version with a number, such as ``v3``, or with an alias."""
        versions = self.versions(collection)
        number = VERSION.fullmatch(alias)
        if number and int(number[1]) < len(versions):
            return versions[int(number[1])]
        return next((artifact for artifact in versions if alias in artifact["aliases"]), None)

    def upload_path(self, artifact_id: str, name: str) -> Path:
        """Where an uploaded file of the artifact is stored."""
        return self.folder / artifact_id / "files" / name.lstrip("/")

    def manifest(self, artifact_id: str) -> dict[str, dict[str, Any]]:
        """The artifact's entries by file name: ``digest``, ``size``, and ``ref`` for files that are stored elsewhere."""
        if artifact_id not in self:
            return {}
        path = self.folder / artifact_id / MANIFEST
        try:
            return _contents(path, path.stat().st_mtime_ns)
        except OSError:
            return {}

    def path_of(self, artifact_id: str, name: str, entry: Mapping[str, Any]) -> Path | None:
        """The path of an artifact's file, which an older version may have uploaded; None when it does not exist."""
        for owner in (artifact_id, str(entry.get("birthArtifactID", ""))):
            path = self.upload_path(owner, name)
            if owner in self and ".." not in Path(name).parts and path.is_file():
                return path
        return None

    def by_digest(self, artifact_id: str, digest: str) -> Path | None:
        """The path of the file with that digest (base64 of an MD5)."""
        for name, entry in self.manifest(artifact_id).items():
            if entry.get("digest") == digest:
                return self.path_of(artifact_id, name, entry)
        return None


@lru_cache(maxsize=64)
def _contents(path: Path, _changed: int) -> dict[str, dict[str, Any]]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8")).get("contents")
    except (ValueError, AttributeError, RecursionError):
        return {}
    entries = contents.items() if isinstance(contents, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, dict)}


def collection_of(artifact: Mapping[str, Any]) -> Collection:
    """The collection of an artifact."""
    return artifact["entity"], artifact["project"], artifact["collection"]


def split_name(name: str) -> tuple[str, str]:
    """Split ``NAME`` or ``NAME:ALIAS`` into collection and alias."""
    collection, _, alias = name.rpartition("/")[2].partition(":")
    return collection, alias or "latest"
