"""Whatever is sent, the server answers with an error of the sender, goes on, and finds all that it had acknowledged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.serve_client import AGENT, BEAT, BUCKET, CREATE, RESUME, RUN, STATE, Client, facts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


ARTIFACT_ID = st.sampled_from(["ARTIFACT", "artifact-0", "", "..", "\0"])
WORD = st.sampled_from(["m", "latest", "v0", "v99999999999", "a/b", "", "..", "é", "x:y"]) | st.text(max_size=9)
ALIASES = st.lists(st.fixed_dictionaries({"alias": WORD}, optional={"artifactCollectionName": WORD}), max_size=3)
ARTIFACT_INPUTS = {
    "createArtifact": ("CreateArtifactInput", "artifact { id aliases { alias } versionIndex }", st.fixed_dictionaries(
        {"entityName": WORD, "projectName": WORD, "artifactTypeName": WORD, "digest": WORD},
        optional={"artifactCollectionName": WORD, "artifactCollectionNames": st.lists(WORD, max_size=2), "runName": WORD,
                  "aliases": ALIASES, "metadata": WORD, "tags": st.lists(st.fixed_dictionaries({"tagName": WORD}), max_size=2)})),
    "commitArtifact": ("CommitArtifactInput", "artifact { id size fileCount currentManifest { file { directUrl } } }",
                       st.fixed_dictionaries({"artifactID": ARTIFACT_ID})),
    "updateArtifact": ("UpdateArtifactInput", "artifact { id tags { name } }", st.fixed_dictionaries(
        {"artifactID": ARTIFACT_ID}, optional={"aliases": ALIASES, "description": WORD, "metadata": WORD})),
    "addAliases": ("AddAliasesInput", "success", st.fixed_dictionaries({"artifactID": ARTIFACT_ID, "aliases": ALIASES})),
    "deleteAliases": ("DeleteAliasesInput", "success", st.fixed_dictionaries({"artifactID": ARTIFACT_ID, "aliases": ALIASES})),
    "useArtifact": ("UseArtifactInput", "artifact { usedBy { edges { node { name } } } }", st.fixed_dictionaries(
        {"artifactID": ARTIFACT_ID, "entityName": WORD, "projectName": WORD, "runName": WORD})),
    "createArtifactFiles": ("CreateArtifactFilesInput", "files { edges { node { name uploadUrl storagePath digest } } }", st.fixed_dictionaries(
        {"artifactFiles": st.lists(st.fixed_dictionaries({"artifactID": ARTIFACT_ID, "name": WORD, "md5": WORD}), max_size=2)})),
}  # fmt: skip
READ_ARTIFACT = """query A($n: String!, $i: ID!, $f: JSONString) {
  artifact(id: $i) { id files { edges { node { name directUrl } } } createdBy { __typename } artifactMemberships { edges { node { id } } } }
  project(name: "p") { artifact(name: $n) { id } artifactCollectionMembership(name: $n) { versionIndex files { totalCount } }
    artifactCollection(name: $n) { __typename id aliases { edges { node { alias } } } artifacts(filters: $f) { totalCount } }
    artifactType(name: $n) { name createdAt artifactCollections { totalCount } } artifactTypes { edges { node { name } } }
    run(name: "r1") { outputArtifacts { totalCount } inputArtifacts { totalCount } } } }"""


@BIG
@given(st.data(), WORD, st.sampled_from([None, "{}", "[", '{"state": "COMMITTED"}', '{"x": 1}']))
def test_any_artifact(client: Client, data: Any, name: str, filters: str | None) -> None:
    made = '{createArtifact(input: {entityName: "local", projectName: "p", artifactTypeName: "t", artifactCollectionName: "m", digest: "d"}) {artifact {id}}}'
    known = client.get(f"mutation M {made}")["createArtifact"]["artifact"]["id"]
    mutation = data.draw(st.sampled_from(sorted(ARTIFACT_INPUTS)))
    kind, wanted, inputs = ARTIFACT_INPUTS[mutation]
    given_input = json.loads(json.dumps(data.draw(inputs)).replace("ARTIFACT", known))
    query = f"mutation M($i: {kind}!) {{ {mutation}(input: $i) {{ {wanted} }} }}"
    for asked, variables in ((query, {"i": given_input}), (READ_ARTIFACT, {"n": name, "i": known, "f": filters})):
        answer = client.http.post(
            "/graphql", content=encoded({"query": asked, "variables": variables}), headers=client.headers
        )
        assert answer.status_code in (200, 400, 404), answer.text
        assert "its log says why" not in answer.text, answer.text


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


TIMES = (
    st.datetimes().map(str)
    | st.sampled_from(["2026-11-27", "2026-11-27T10:00:00Z", "9999-12-31", "0001-01-01", "x", ""])
    | JSON
)
CONDITIONS = st.dictionaries(
    st.sampled_from(["$eq", "$ne", "$in", "$nin", "$gt", "$lte", "$exists", "$regex", "$options", "$not", "$where"]),
    JSON | TIMES | st.sampled_from(["(a+)+$", "[", "r.*", "i", "\\d{1000000}", "(?R)"]), max_size=3)  # fmt: skip
CONDITIONED = st.dictionaries(
    st.sampled_from(["created_at", "updatedAt", "name", "tags", "summary_metrics.loss", "config.a.value.b", "$nor", "$and"]),
    CONDITIONS | TIMES | st.lists(CONDITIONS, max_size=2), max_size=3)  # fmt: skip


@BIG
@given(CONDITIONED)
def test_any_condition(client: Client, filters: Any) -> None:
    query = 'query Runs($f: JSONString) { project(name: "p") { runCount(filters: $f) } }'
    body = encoded({"query": query, "variables": {"f": json.dumps(filters)}})
    answer = client.http.post("/graphql", content=body, headers=client.headers)
    assert answer.status_code == 200 and "its log says why" not in answer.text, answer.text


SPEC = st.fixed_dictionaries({}, optional={k: JSON | st.integers(0, 5) for k in ("minStep", "maxStep", "samples")} | {"keys": JSON | st.lists(st.text(max_size=3), max_size=2)})  # fmt: skip


@BIG
@given(SPEC, JSON, JSON)
def test_any_piece_of_a_history(client: Client, spec: Any, low: Any, high: Any) -> None:
    query = 'query H($s: JSONString!, $l: Int64, $h: Int64) { project(name: "p") { run(name: "r1") { sampledHistory(specs: [$s]) history(minStep: $l, maxStep: $h) historyKeys } } }'
    body = encoded({"query": query, "variables": {"s": json.dumps(spec), "l": low, "h": high}})
    answer = client.http.post("/graphql", content=body, headers=client.headers)
    assert answer.status_code in (200, 400) and "its log says why" not in answer.text, answer.text


def test_after_all_that_everything_is_there(client: Client, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(client.folder, copy)
    again = Server(copy, "local")
    try:
        assert facts(again) == facts(client.server)
    finally:
        again.close()
