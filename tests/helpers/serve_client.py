"""Speaks to the server's application without a network, for tests."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from isaerft_sweep.serve.app import Application
from isaerft_sweep.serve.keys import KeyRing
from isaerft_sweep.serve.server import Server
from isaerft_sweep.serve.signing import Signer

CONFIG = """\
method: {method}
metric: {{name: loss, goal: minimize}}
run_cap: {cap}
{more}
parameters:
  lr: {{distribution: log_uniform_values, min: 1.0e-4, max: 1.0}}
  net: {{parameters: {{kind: {{values: [a, b, c]}}}}}}
program: train.py
"""
CREATE = "mutation UpsertSweep($c: String, $p: String) { upsertSweep(input: {config: $c, projectName: $p}) { sweep { id name state } configValidationWarnings } }"
STATE = "mutation UpsertSweep($id: ID, $s: String) { upsertSweep(input: {id: $id, state: $s}) { sweep { name state } } }"
AGENT = 'mutation CreateAgent($s: String!) { createAgent(input: {host: "h", projectName: "p", sweep: $s}) { agent { id } } }'
BEAT = "mutation Heartbeat($id: ID!, $r: JSONString) { agentHeartbeat(input: {id: $id, runState: $r}) { agent { id } commands } }"
BUCKET = 'mutation UpsertBucket($n: String, $c: JSONString, $s: String) { upsertBucket(input: {name: $n, modelName: "p", config: $c, sweep: $s}) { bucket { id name state historyLineCount } inserted } }'
RESUME = 'query RunResumeStatus($n: String!) { model(name: "p") { bucket(name: $n, missingOk: true) { historyLineCount historyTail wandbConfig(keys: ["t"]) } } }'
RUN = 'query Run($n: String!) { project(name: "p") { run(name: $n) { id state summaryMetrics historyLineCount stopped history(samples: 100000) } } }'


class Client:
    """Speaks to the application as wandb does, without a network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = Server(folder, "local")
        keys = KeyRing(folder / "keys.jsonl")
        self.key = keys.add("someone")
        self.http = TestClient(Application(self.server, keys, Signer(folder / "secret"), 1 << 20).asgi())
        self.headers = {"Authorization": "Basic " + base64.b64encode(f"api:{self.key}".encode()).decode()}

    def ask(self, query: str, **variables: Any) -> Any:
        answer = self.http.post("/graphql", json={"query": query, "variables": variables}, headers=self.headers)
        return {"status": answer.status_code, **answer.json()}

    def get(self, query: str, **variables: Any) -> Any:
        answer = self.ask(query, **variables)
        assert "errors" not in answer, answer
        return answer["data"]

    def sweep(self, method: str = "random", cap: int = 9, more: str = "") -> dict[str, Any]:
        config = CONFIG.format(method=method, cap=cap, more=more)
        found: dict[str, Any] = self.get(CREATE, c=config, p="p")["upsertSweep"]["sweep"]
        return found

    def agent(self, sweep: dict[str, Any]) -> str:
        return str(self.get(AGENT, s=sweep["name"])["createAgent"]["agent"]["id"])

    def beat(self, agent: str, *running: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(
            self.get(BEAT, id=agent, r=json.dumps(dict.fromkeys(running, True)))["agentHeartbeat"]["commands"]
        )
        return found

    def begin(self, run: str, sweep: dict[str, Any] | None = None) -> Any:
        return self.get(BUCKET, n=run, c="{}", s=sweep["name"] if sweep else None)["upsertBucket"]

    def stream(self, run: str, rows: list[dict[str, Any]], offset: int = 0, summary: Any = None, **ending: Any) -> Any:
        files: dict[str, Any] = (
            {"wandb-history.jsonl": {"offset": offset, "content": [json.dumps(row) for row in rows]}} if rows else {}
        )
        if summary is not None:
            files["wandb-summary.json"] = {"offset": 0, "content": [json.dumps(summary)]}
        return self.http.post(f"/files/local/p/{run}/file_stream", json={"files": files, **ending}, headers=self.headers)

    def run(self, name: str) -> Any:
        return self.get(RUN, n=name)["project"]["run"]


def facts(server: Server) -> Any:
    """All that was acknowledged, as far as it does not depend on the clock."""
    runs = {
        run.key.name: (
            run.state,
            run.exitcode,
            run.stop,
            run.agent,
            run.attempt,
            run.config,
            run.summary,
            run.line_counts,
            run.curve,
            run.rows(),
            run.metadata,
        )
        for run in server.runs.values()
        if run.created
    }
    sweeps = {
        s.id: (
            s.state,
            s.config,
            [(r.index, dict(r.point.params), r.state, r.attempt, r.job, r.metric, r.given_up) for r in s.records.values()],
        )
        for s in server.sweeps.values()
    }
    agents = {a.id: (a.sweep, a.host, a.user) for a in server.agents.values()}
    return runs, sweeps, agents, list(server.projects)
