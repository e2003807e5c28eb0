"""Whatever is sent, the server answers with an error of the sender, goes on, and finds all that it had acknowledged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_client import AGENT, BEAT, BUCKET, CREATE, RESUME, RUN, STATE, Client, facts

from isaerft_sweep.serve.server import Server

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(["r1", "r2", "", "..", "a/b", "R" * 300, "\0", "é", "x\ny"]) | st.text(max_size=20)
STREAMS = st.sampled_from(["wandb-history.jsonl", "wandb-summary.json", "wandb-events.jsonl", "output.log", "x"])
PIECE = st.fixed_dictionaries(
    {
        "offset": st.integers(-3, 10) | JSON,
        "content": st.lists(st.sampled_from(['{"loss": 1}', "{}", "[1]", "{", "NaN"]) | st.text(max_size=9), max_size=4)
        | JSON,
    }
)
STREAM = st.fixed_dictionaries(
    {},
    optional={
        "files": st.dictionaries(STREAMS, PIECE | JSON, max_size=3) | JSON,
        "complete": JSON,
        "exitcode": JSON,
        "preempting": JSON,
    },
)
QUERIES = st.sampled_from([CREATE, STATE, AGENT, BEAT, BUCKET, RESUME, RUN])
VARIABLES = st.dictionaries(st.sampled_from(["c", "p", "id", "s", "r", "n"]), JSON | NAMES, max_size=6)
BIG = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Client(tmp_path_factory.mktemp("fuzz"))
    made.begin("r1", made.sweep())
    yield made
    made.server.close()


def encoded(content: Any) -> bytes:
    return json.dumps(content).encode("utf-8", "surrogatepass")


@BIG
@given(QUERIES, VARIABLES)
def test_any_variables(client: Client, query: str, variables: dict[str, Any]) -> None:
    answer = client.http.post("/graphql", content=encoded({"query": query, "variables": variables}), headers=client.headers)
    assert answer.status_code in (200, 400, 404)
    assert "its log says why" not in answer.text, answer.text


@BIG
@given(st.text(max_size=200) | st.binary(max_size=200), st.sampled_from(["/graphql", "/files/local/p/r1/file_stream"]))
def test_any_body(client: Client, body: str | bytes, path: str) -> None:
    content = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    assert client.http.post(path, content=content, headers=client.headers).status_code in (200, 400)


@BIG
@given(NAMES, STREAM)
def test_any_stream(client: Client, name: str, content: dict[str, Any]) -> None:
    from urllib.parse import quote

    answer = client.http.post(
        f"/files/local/p/{quote(name, safe='')}/file_stream", content=encoded(content), headers=client.headers
    )
    assert answer.status_code in (200, 400, 404, 405)
    assert client.http.get("/local/p/runs/r1", headers=client.headers).status_code == 200, "its page can still be drawn"


@BIG
@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"]),
    st.text(max_size=60),
    st.dictionaries(st.sampled_from(["until", "signature", "x"]), st.text(max_size=10)),
)
def test_any_address(client: Client, method: str, path: str, query: dict[str, str]) -> None:
    from urllib.parse import quote

    for place in ("/", "/uploads/"):
        answer = client.http.request(
            method, place + quote(path.encode("utf-8", "replace")), params=query, headers=client.headers
        )
        assert answer.status_code < 500


@BIG
@given(
    st.text(alphabet='{}()$:!,"[] \n#abcxyz.@&|_0123456789', max_size=120), st.sampled_from(["query ", "mutation ", "{", ""])
)
def test_any_query(client: Client, text: str, start: str) -> None:
    answer = client.http.post("/graphql", json={"query": start + text}, headers=client.headers)
    assert answer.status_code == 200 and ("errors" in answer.json() or answer.json()["data"] is not None)


@BIG
@given(JSON, st.text(max_size=20))
def test_any_filter_and_order(client: Client, filters: Any, order: str) -> None:
    query = 'query Runs($f: JSONString, $o: String) { project(name: "p") { runs(filters: $f, order: $o) { edges { node { name } } } } }'
    answer = client.http.post(
        "/graphql",
        content=encoded({"query": query, "variables": {"f": json.dumps(filters), "o": order}}),
        headers=client.headers,
    )
    assert answer.status_code == 200 and "its log says why" not in answer.text, answer.text


def test_after_all_that_everything_is_there(client: Client, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(client.folder, copy)
    again = Server(copy, "local")
    try:
        assert facts(again) == facts(client.server)
    finally:
        again.close()
