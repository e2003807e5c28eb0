"""Stand-ins on loopback for services that cannot be had in a test: W&B's GraphQL API, and the Hub's HTTP API for what is
uploaded and for what is downloaded.

They answer what the real clients ask (seen with wandb 0.31 and huggingface_hub 2.4) and remember what was sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


@contextmanager
def served(answerer: Any) -> Iterator[str]:
    """``answerer.answer(method, path, headers, body)`` gives (status, content) or (status, content, headers); the address
    while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, content, *headers = answerer.answer(self.command, self.path, self.headers, body)
            sent = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            own = headers[0] if headers else {}
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(sent)), **own}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(sent)

        do_GET = do_POST = do_PUT = do_HEAD = _reply  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        answerer.address = f"http://127.0.0.1:{server.server_port}"
        yield answerer.address
    finally:
        server.shutdown()
        server.server_close()


class StandInWandb:
    """One sweep with runs, as W&B's API tells of them."""

    def __init__(self, config: str, runs: list[dict[str, Any]], rows: dict[str, list[dict[str, Any]]]) -> None:
        self.config, self.runs, self.rows = config, runs, rows
        self.asked: list[str] = []

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        if not path.startswith("/graphql"):
            return 404, {}
        asked = json.loads(body)
        query, variables = asked["query"], asked.get("variables") or {}
        name = query.split("query ", 1)[1].split("(")[0].split("{")[0].strip()
        self.asked.append(name)
        answer = getattr(self, f"_{name}", None)
        if answer is None:
            return 200, {"errors": [{"message": f"unknown operation {name}"}]}
        return 200, {"data": answer(variables)}

    def _Viewer(self, variables: Any) -> Any:  # noqa: N802
        return {"viewer": {"id": "u", "entity": "e", "username": "u", "email": "", "flags": "{}", "teams": {"edges": []}}}

    _GetDefaultEntity = _Viewer

    def _GetSweep(self, variables: Any) -> Any:  # noqa: N802
        if variables["name"] != "abcd1234":
            return {"project": {"sweep": None}}
        facts = {"id": "s", "name": "abcd1234", "displayName": None, "method": "random", "state": "RUNNING", "description": None,
                 "bestLoss": None, "config": self.config, "createdAt": "2026-11-24T10:00:00Z", "updatedAt": None,
                 "runCount": len(self.runs), "runCountExpected": None, "__typename": "Sweep"}  # fmt: skip
        return {"project": {"sweep": facts}}

    def _Runs(self, variables: Any) -> Any:  # noqa: N802
        edges = [{"node": self._node(run), "cursor": run["name"]} for run in self.runs]
        runs = {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}
        return {"project": {"internalId": "1", "runCount": len(edges), "readOnly": True, "runs": runs}}

    def _node(self, run: dict[str, Any]) -> dict[str, Any]:
        facts = {"id": run["name"], "tags": [], "sweepName": "abcd1234", "group": None, "jobType": "trial", "commit": None,
                 "readOnly": True, "heartbeatAt": None, "description": "", "notes": "", "systemMetrics": "{}", "projectId": 1,
                 "historyLineCount": len(self.rows.get(run["name"], [])), "user": {"name": "u", "username": "u"}}  # fmt: skip
        return {**facts, **run, "config": json.dumps(run["config"]), "summaryMetrics": json.dumps(run["summaryMetrics"])}

    def _Run(self, variables: Any) -> Any:  # noqa: N802
        return {"project": {"run": self._node(next(r for r in self.runs if r["name"] == variables["name"]))}}

    def _RunHistoryKeys(self, variables: Any) -> Any:  # noqa: N802
        return {"project": {"run": {"historyKeys": {"lastStep": len(self.rows[variables["name"]]), "keys": {}}}}}

    def _RunParquetHistory(self, variables: Any) -> Any:  # noqa: N802
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": []}}}}

    def _HistoryPage(self, variables: Any) -> Any:  # noqa: N802
        wanted = range(variables["minStep"], variables["maxStep"])
        rows = [row for row in self.rows[variables["run"]] if row["_step"] in wanted]
        return {"project": {"run": {"history": [json.dumps(row) for row in rows]}}}


class StandInHub:
    """Takes repositories and commits as the Hub does, large files by LFS; keeps what was sent."""

    def __init__(self, token: str) -> None:
        self.token, self.address = token, ""
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.cards: list[str] = []
        self.broken = False
        self.existing: dict[str, bool] = {}
        """Repositories, and whether they are private."""

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        if path.startswith("/lfs/"):
            self.objects[path.rsplit("/", 1)[1]] = body
            return 200, {}
        if headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {"error": "Invalid username or password."}
        if self.broken:
            return 500, {"error": "out of order"}
        content = json.loads(body) if body and "/commit/" not in path else {}
        if path == "/api/repos/create":
            return self._create(content)
        name = path.removeprefix("/api/models/").removesuffix("/revision/main")
        if method == "GET" and name in self.existing:
            return 200, {"id": name, "modelId": name, "private": self.existing[name], "tags": [], "siblings": []}
        if path == "/api/validate-yaml":
            self.cards.append(content["content"])
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in content["files"]
            ]
            return 200, {"files": modes}
        if path.endswith("/info/lfs/objects/batch"):
            found = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.address}/lfs/{o['oid']}"}}}
                for o in content["objects"]
            ]
            return 200, {"transfer": "basic", "objects": found}
        if "/commit/" in path:
            return 200, self._commit(path, body)
        return 404, {"error": f"nothing at {path}"}

    def _create(self, content: dict[str, Any]) -> tuple[int, Any]:
        self.created.append(content)
        name = f"{content.get('organization') or 'someone'}/{content['name']}"
        if name in self.existing:
            return 409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}
        self.existing[name] = content.get("visibility") == "private"
        return 200, {"url": f"{self.address}/{name}", "id": name}

    def _commit(self, path: str, body: bytes) -> dict[str, Any]:
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
        repository = path.removeprefix("/api/models/").split("/commit/")[0]
        address = f"{self.address}/{repository}/commit/0123456789"
        return {"success": True, "commitOid": "0123456789", "commitUrl": address, "hookOutput": ""}


class StandInModelHub:
    """Stands in for the Hub, which cannot be reached here: serves files of repositories; what huggingface_hub asks for.

    ``folders``: by repository ("org/name", or "datasets/org/name") the folder that holds its files.
    """

    commit = "a" * 40

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.files = {
            name: {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            for name, folder in folders.items()
        }
        self.asked: list[str] = []

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any, dict[str, str]]:
        self.asked.append(path)
        path = unquote(path.split("?")[0]).removeprefix("/")
        if path.startswith("api/"):
            name = next((n for n in self.files if f"{path}/".startswith(f"api/{_with_kind(n)}/")), None)
            recursive = "recursive=true" in self.asked[-1].lower()
            return (
                self._described(name, path.removeprefix(f"api/{_with_kind(name)}/"), body, recursive)
                if name
                else (404, {}, {})
            )
        name = next((n for n in self.files if path.startswith(f"{n}/resolve/")), None)
        wanted = path.removeprefix(f"{name}/resolve/").partition("/")[2]
        if name is None or wanted not in self.files[name]:
            return 404, {}, {"X-Error-Code": "EntryNotFound" if name else "RepoNotFound"}
        content = self.files[name][wanted]
        etag = hashlib.sha1(content).hexdigest()
        return 200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit}

    def _described(self, name: str, rest: str, body: bytes, recursive: bool) -> tuple[int, Any, dict[str, str]]:
        files = self.files[name]
        entries = [{"type": "file", "path": n, "size": len(c), "oid": n} for n, c in files.items()]
        plain = name.removeprefix("datasets/")
        found: Any = {"id": plain, "modelId": plain, "sha": self.commit, "private": False, "tags": [],
                      "siblings": [{"rfilename": n} for n in files]}  # fmt: skip
        if rest.startswith("tree/"):
            folder = "".join(f"{part}/" for part in rest.split("/")[2:])
            below = [e for e in entries if e["path"].startswith(folder)]
            if not below:
                return 404, {}, {"X-Error-Code": "EntryNotFound"}
            inner = sorted(
                {
                    folder + e["path"].removeprefix(folder).split("/")[0]
                    for e in below
                    if "/" in e["path"].removeprefix(folder)
                }
            )
            flat = [e for e in below if "/" not in e["path"].removeprefix(folder)]
            found = below if recursive else [*flat, *({"type": "directory", "path": path, "oid": path} for path in inner)]
        elif rest.startswith("paths-info/"):
            wanted = json.loads(body)["paths"]
            found = [e for e in entries if e["path"] in wanted]
        return 200, found, {}


def _with_kind(name: str) -> str:
    return name if name.startswith("datasets/") else f"models/{name}"
