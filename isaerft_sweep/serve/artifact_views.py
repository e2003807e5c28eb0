"""What GraphQL shows of artifacts; see ``views``."""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from isaerft_sweep.serve import artifacts, run_views, views
from isaerft_sweep.serve.artifacts import MANIFEST, Collection, collection_of
from isaerft_sweep.serve.caller import Caller, global_id, stamp
from isaerft_sweep.serve.checks import RequestError
from isaerft_sweep.serve.filters import FILES, matches, page, read_filter, snake
from isaerft_sweep.serve.runs import RunKey


@dataclass(frozen=True)
class ArtifactView:
    """A version."""

    caller: Caller
    known: Mapping[str, Any]
    typename = "Artifact"
    ttl_duration_seconds = -2
    """W&B's "as the collection says", which here says nothing: artifacts stay."""
    ttl_is_inherited = True
    commit_hash = None

    def __getattr__(self, name: str) -> Any:
        """Facts that are shown as the client has told them."""
        told = {"state": "state", "digest": "digest", "metadata": "metadata", "description": "description",
                "digest_algorithm": "digestAlgorithm", "history_step": "historyStep"}  # fmt: skip
        if name in told:
            return self.known.get(told[name])
        raise AttributeError(name)

    @property
    def id(self) -> str:
        return str(self.known["id"])

    @property
    def created_at(self) -> str:
        return stamp(self.known["created"])

    @property
    def updated_at(self) -> str:
        return stamp(self.known["updated"])

    @property
    def version_index(self) -> int | None:
        return self.caller.server.artifacts.version_of(self.known)

    @property
    def artifact_type(self) -> TypeView:
        return TypeView(self.caller, collection_of(self.known)[:2], self.known["type"])

    @property
    def artifact_sequence(self) -> CollectionView:
        return CollectionView(self.caller, collection_of(self.known))

    @property
    def tags(self) -> list[Any]:
        return [{"id": global_id("Tag", tag), "name": tag} for tag in self.known.get("tags") or ()]

    @property
    def aliases(self) -> list[Any]:
        names = self.known["aliases"] if self.known["state"] == artifacts.COMMITTED else ()
        return [
            {"id": global_id("Alias", self.id, a), "alias": a, "artifactCollection": self.artifact_sequence} for a in names
        ]

    @property
    def _manifest(self) -> dict[str, dict[str, Any]]:
        return self.caller.server.artifacts.manifest(self.id)

    @property
    def size(self) -> int:
        return sum(int(entry.get("size") or 0) for entry in self._manifest.values())

    @property
    def file_count(self) -> int:
        return len(self._manifest)

    @property
    def current_manifest(self) -> Any:
        return manifest_view(self.caller, self.known)

    def files(self, names: list[str] | None = None, after: str | None = None, first: int | None = None) -> Any:
        wanted = set(names or ())
        entries = [(n, e) for n, e in self._manifest.items() if not e.get("ref") and (not wanted or n in wanted)]
        return page(entries, after, first, lambda one: ArtifactFileView(self.caller, self.id, *one), FILES)

    def files_by_manifest_entries(self, entries: list[dict[str, Any]] | None = None, **_how: Any) -> Any:
        found = [ArtifactFileView(self.caller, self.id, entry["name"], entry) for entry in entries or ()]
        return page(found, None, None, lambda view: view, most=len(found))

    @property
    def artifact_memberships(self) -> Any:
        return {"edges": [{"node": MembershipView(self.caller, self.known)}]}

    @property
    def created_by(self) -> run_views.RunView | None:
        entity, project, _ = collection_of(self.known)
        run = self.caller.server.runs.get(RunKey(entity, project, self.known.get("run") or ""))
        return run_views.RunView(self.caller, run) if run else None

    @property
    def used_by(self) -> Any:
        runs = (self.caller.server.runs.get(RunKey(*user)) for user in self.known.get("users") or ())
        return {"edges": [{"node": run_views.RunView(self.caller, run)} for run in runs if run]}


@dataclass(frozen=True)
class ArtifactFileView:
    """A file of an artifact; ``entry`` is its manifest's."""

    caller: Caller
    artifact_id: str
    name: str
    entry: Mapping[str, Any]
    updated_at = None

    @property
    def id(self) -> str:
        return global_id("File", self.artifact_id, self.name)

    @property
    def display_name(self) -> str:
        return self.name

    @property
    def digest(self) -> str | None:
        return self.entry.get("digest")

    md5 = digest

    @property
    def size_bytes(self) -> int:
        return int(self.entry.get("size") or 0)

    @property
    def mimetype(self) -> str:
        return mimetypes.guess_type(self.name)[0] or "application/octet-stream"

    @property
    def storage_path(self) -> str:
        return f"{self.artifact_id}/files/{self.name}"

    def url(self, upload: bool = False) -> str | None:
        return self.upload_url if upload else self.direct_url

    @property
    def direct_url(self) -> str:
        path = self.caller.server.artifacts.path_of(self.artifact_id, self.name, self.entry)
        if path is None:
            raise RequestError(f"the artifact {self.artifact_id} has no file '{self.name[:200]}' here.", 404)
        return self._address(path, "GET")

    @property
    def upload_url(self) -> str:
        return self._address(self.caller.server.artifacts.place(self.artifact_id, self.name), "PUT")

    upload_headers: Sequence[str] = ()

    @property
    def artifact(self) -> ArtifactView:
        return ArtifactView(self.caller, artifacts.find(self.caller, self.artifact_id))

    def _address(self, path: Path, method: str) -> str:
        return self.caller.file_url(f"/uploads/{path.relative_to(self.caller.server.folder).as_posix()}", method)


def manifest_view(caller: Caller, known: Mapping[str, Any]) -> Any:
    """The manifest and where it is uploaded to and downloaded from."""
    path, headers = f"/uploads/artifacts/{known['id']}/{MANIFEST}", list[str]()
    urls = {"uploadUrl": caller.file_url(path, "PUT"), "directUrl": caller.file_url(path, "GET"), "uploadHeaders": headers}
    return {"id": known["id"], "file": {"id": f"{known['id']}/{MANIFEST}", "name": MANIFEST, **urls}}


@dataclass(frozen=True)
class CollectionView:
    """The versions of one name: W&B's sequence. Its portfolios, which link other projects' versions, are not here."""

    caller: Caller
    key: Collection
    typename = "ArtifactSequence"
    description = None
    state = "READY"
    tags = {"edges": ()}  # noqa: RUF012

    @property
    def _versions(self) -> list[dict[str, Any]]:
        return self.caller.server.artifacts.versions(self.key)

    @property
    def id(self) -> str:
        return global_id("ArtifactCollection", *self.key)

    @property
    def name(self) -> str:
        return self.key[2]

    @property
    def project(self) -> views.ProjectView:
        return views.ProjectView(self.caller, self.key[:2])

    @property
    def created_at(self) -> str | None:
        return stamp(self._versions[0]["created"]) if self._versions else None

    @property
    def updated_at(self) -> str | None:
        return stamp(self._versions[-1]["updated"]) if self._versions else None

    @property
    def default_artifact_type(self) -> TypeView:
        return TypeView(self.caller, self.key[:2], self._versions[0]["type"])

    @property
    def digest_algorithm(self) -> Any:
        return self._versions[-1].get("digestAlgorithm") if self._versions else None

    @property
    def latest_artifact(self) -> ArtifactView | None:
        return ArtifactView(self.caller, self._versions[-1]) if self._versions else None

    def aliases(self, after: str | None = None, first: int | None = None) -> Any:
        found = [alias for known in self._versions for alias in ArtifactView(self.caller, known).aliases]
        return page(found, after, first, lambda alias: alias)

    def artifacts(
        self, after: str | None = None, first: int | None = None, order: str | None = None, filters: str | None = None
    ) -> Any:
        wanted = read_filter(filters)
        found = [a for a in self._versions if matches(partial(_field_of, a), wanted)]
        found = found if (order or "").startswith("+") else found[::-1]
        listed = page(found, after, first, lambda known: ArtifactView(self.caller, known))
        for edge in listed["edges"]:
            edge["version"] = f"v{edge['node'].version_index}"
        return listed

    def artifact_membership(self, alias_name: str) -> MembershipView | None:
        known = self.caller.server.artifacts.named(self.key, alias_name)
        return MembershipView(self.caller, known) if known else None


def _field_of(known: Mapping[str, Any], name: str) -> Any:
    """What versions can be filtered by."""
    fields = {"state": "state", "tags": "tags", "digest": "digest", "created_at": "created", "updated_at": "updated"}
    if snake(name) not in fields:
        raise RequestError(f"artifacts cannot be filtered by '{name[:200]}'. Valid: {', '.join(fields)}.")
    return known.get(fields[snake(name)])


@dataclass(frozen=True)
class MembershipView:
    """A version in its collection."""

    caller: Caller
    known: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name in ("version_index", "created_at", "aliases", "files"):
            return getattr(self.artifact, name)
        raise AttributeError(name)

    @property
    def id(self) -> str:
        return global_id("ArtifactMembership", self.known["id"])

    @property
    def artifact(self) -> ArtifactView:
        return ArtifactView(self.caller, self.known)

    @property
    def artifact_collection(self) -> CollectionView:
        return self.artifact.artifact_sequence


@dataclass(frozen=True)
class TypeView:
    """The collections of one type in a project."""

    caller: Caller
    project: tuple[str, str]
    name: str
    description = None

    @property
    def id(self) -> str:
        return global_id("ArtifactType", *self.project, self.name)

    @property
    def created_at(self) -> str | None:
        return min((view.created_at for view in self._collections() if view.created_at), default=None)

    def _collections(self) -> list[CollectionView]:
        return [view for view in collections(self.caller, self.project) if view.default_artifact_type.name == self.name]

    def artifact_collection(self, name: str) -> CollectionView | None:
        return next((view for view in self._collections() if view.name == name), None)

    artifact_sequence = artifact_collection

    def artifact(self, name: str) -> ArtifactView | None:
        known = named(self.caller, self.project, name)
        return ArtifactView(self.caller, known) if known and known["type"] == self.name else None

    def artifact_collections(
        self, after: str | None = None, first: int | None = None, filters: str | None = None, order: str | None = None
    ) -> Any:
        refuse_filters(filters)
        return page(self._collections(), after, first, lambda view: view)


def collections(caller: Caller, project: tuple[str, str]) -> list[CollectionView]:
    """A project's, by age."""
    return [CollectionView(caller, key) for key in caller.server.artifacts.collections if key[:2] == project]


def types(caller: Caller, project: tuple[str, str]) -> list[TypeView]:
    """The types of which a project has artifacts."""
    names = dict.fromkeys(view.default_artifact_type.name for view in collections(caller, project))
    return [TypeView(caller, project, name) for name in names]


def named(caller: Caller, project: tuple[str, str], name: str) -> dict[str, Any] | None:
    """The version that ``NAME``, ``NAME:v3`` or ``NAME:ALIAS`` means in a project."""
    collection, alias = artifacts.split_name(name)
    return caller.server.artifacts.named((*project, collection), alias)


def refuse_filters(filters: str | None) -> None:
    """Raise RequestError rather than list what was not asked for."""
    if read_filter(filters):
        raise RequestError("collections cannot be filtered by this server: leave filters out.")
