"""The server under load and under attack: nobody can keep it from answering, nor read what is not theirs."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import stat
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from helpers.serve_client import Client
from helpers.serving import BIN, Serving, free_port
from helpers.waiting import wait_for

from isaerft_sweep.serve import bodies, connections, query_cost

# -- what a query may cost


@pytest.fixture
def many(client: Client, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setattr("isaerft_sweep.journal.append_log.os.fsync", lambda _file: None)
    for i in range(250):
        client.begin(f"r{i}")
        client.stream(f"r{i}", [{"_step": step, "loss": float(step)} for step in range(40)], summary={"loss": i})
    return client


NESTED = 'query R { project(name: "p") { runs(first: 1000) { edges { node { project { runs(first: 1000) { edges { node { id name state config summaryMetrics } } } } } } } } }'


@pytest.mark.parametrize(
    "query",
    [
        NESTED,
        NESTED.replace("id name state config summaryMetrics", "history(samples: 1000)"),
        "query R { " + " ".join(f'a{i}: project(name: "p") {{ runs {{ edges {{ node {{ id name state config createdAt updatedAt tags }} }} }} }}' for i in range(70)) + " }",
        'query R($f: JSONString) { project(name: "p") { ' + " ".join(f"a{i}: runCount(filters: $f)" for i in range(100)) + " } }",
    ],
    ids=["runs in runs", "rows in runs", "aliases", "filters"],
)  # fmt: skip
def test_a_query_that_would_keep_agents_waiting_is_refused(many: Client, query: str) -> None:
    began = time.monotonic()
    answer = many.ask(query, f=json.dumps({"$or": [{"name": f"x{i}"} for i in range(500)]}))
    assert "asks for too much at once" in answer["errors"][0]["message"] and answer["status"] == 400
    assert len(answer["errors"]) == 1 and time.monotonic() - began < 10  # it takes a second or two


READ = 'query R($s: [JSONString!]!, $o: String) { project(name: "p") { run(name: "r1") { sampledHistory(specs: $s) } runs(order: $o) { totalCount } } }'


def test_long_lists_in_variables_are_refused_too(many: Client) -> None:
    keys = {"keys": [f"k{i}" for i in range(100_000)]}
    for variables in ({"s": [json.dumps(keys)] * 5}, {"s": ["{}"] * 150_000}, {"s": [], "o": "+name," * 100_000}):
        began = time.monotonic()
        said = json.dumps(many.ask(READ, **variables)["errors"])
        assert ("too much at once" in said or "at most 1000 characters" in said) and time.monotonic() - began < 10


def test_many_files_at_once_are_not_too_much(client: Client) -> None:
    """wandb asks for the addresses of up to 10,000 files in one request."""
    made = 'mutation M { createArtifact(input: {entityName: "local", projectName: "p", artifactTypeName: "t", artifactCollectionName: "m", digest: "d"}) { artifact { id } } }'
    artifact = client.get(made)["createArtifact"]["artifact"]["id"]
    create = "mutation C($f: [CreateArtifactFileSpecInput!]!) { createArtifactFiles(input: {artifactFiles: $f}) { files { edges { node { id name displayName uploadUrl uploadHeaders storagePath uploadMultipartUrls { uploadID } artifact { id } } } } } }"
    files = [{"artifactID": artifact, "name": f"f{i}", "md5": "x"} for i in range(10_000)]
    assert len(client.get(create, f=files)["createArtifactFiles"]["files"]["edges"]) == 10_000


def test_what_clients_ask_for_is_not_too_much(many: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    fragment = "id tags name displayName sweepName state config group jobType commit readOnly createdAt heartbeatAt description notes systemMetrics summaryMetrics historyLineCount user { name username } historyKeys"
    query = f'query Runs($a: String, $n: Int) {{ project(name: "p") {{ runCount runs(first: $n, after: $a, order: "-summary_metrics.loss") {{ edges {{ node {{ {fragment} }} cursor }} pageInfo {{ endCursor hasNextPage }} }} }} }}'
    names: list[str] = []
    after = None
    while True:
        runs = many.get(query, a=after, n=1000)["project"]["runs"]
        names += [edge["node"]["name"] for edge in runs["edges"]]
        after = runs["edges"][-1]["cursor"]
        if not runs["pageInfo"]["hasNextPage"]:
            break
    assert names == [f"r{i}" for i in reversed(range(250))], "in pages, and all of them"
    monkeypatch.setattr(query_cost, "LIMIT", 2000)
    many.begin("long")
    many.stream("long", [{"_step": step, "loss": 1.0} for step in range(1500)])
    assert len(many.run("long")["history"]) == 1500
    sampled = (
        'query H($s: JSONString!) { project(name: "p") { run(name: "long") { sampledHistory(specs: [$s]) historyKeys } } }'
    )
    monkeypatch.setattr(query_cost, "LIMIT", 700)
    (rows,) = many.get(sampled, s=json.dumps({"keys": ["_step", "loss"]}))["project"]["run"]["sampledHistory"]
    assert len(rows) == 500, "however long the run is"


@pytest.mark.parametrize(
    "query",
    [
        'query R { project(name: "' + "x" * (10 << 20) + '") { id } }',
        'query R { project(name: """' + "\n " * (5 << 20) + '""") { id } }',
        "query R { viewer { " + "id " * 20_000 + "} }",
        "query R { " + " ".join(f'project(name: "{i}") {{ id }}' for i in range(1600)) + " }",
        "query R { " + "{" * 40_000,
        "#" * (20 << 20),
        "query R { __schema { " + "types { fields { type { " + "fields { type { " * 7 + "name" + " }" * 19,
    ],
    ids=["literal", "block", "fields", "conflicts", "depth", "comment", "the schema"],
)  # fmt: skip
def test_a_query_of_any_size_is_refused_at_once(client: Client, query: str) -> None:
    began = time.monotonic()
    answer = client.ask(query)
    assert answer["errors"] and time.monotonic() - began < 3
    assert client.get("query V { viewer { id } }")


def test_large_values_come_in_variables(client: Client) -> None:
    client.get(
        'mutation U($c: JSONString) { upsertBucket(input: {name: "r1", modelName: "p", config: $c}) { bucket { id } } }',
        c=json.dumps({"a": {"value": "x" * (5 << 20)}}),
    )
    create = 'mutation C($f: [String!]!) { createRunFiles(input: {entityName: "local", projectName: "p", runName: "r1", files: $f}) { runID } }'
    assert "at most 200000 values" in client.ask(create, f=["x"] * 300_000)["error"]


# -- who may read the folder


def modes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}


@pytest.mark.slow
def test_nobody_else_can_read_what_the_server_writes(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o755)
    serving = Serving(tmp_path)
    serving.start()
    try:
        (tmp_path / "s.yaml").write_text(
            "method: random\nmetric: {name: loss}\nprogram: p.py\nparameters: {lr: {min: 0.0, max: 1.0}}\n"
        )
        serving.sweep(tmp_path / "s.yaml")
        program = "import wandb; r = wandb.init(id='r1', project='demo', settings=wandb.Settings(silent=True)); r.log({'a': 1}); r.finish()"
        assert serving.run(str(BIN / "python"), "-c", program).returncode == 0
        found = modes(serving.data)
        assert {"secret", "keys.jsonl", "server.jsonl", "server.log", "runs/local/demo/r1.jsonl"} <= set(found)
        assert all(not mode & 0o077 for mode in found.values()), found
    finally:
        serving.kill()
    os.chmod(serving.data, 0o755)  # as an older version has left it
    serving.start()
    serving.kill()
    assert not modes(serving.data)["."] & 0o077


def test_the_secret_is_never_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isaerft_sweep.serve.keys import KeyRing
    from isaerft_sweep.serve.signing import Signer

    seen: list[int] = []
    replace, fsync = os.replace, os.fsync

    def look(*_: Any) -> None:
        seen.extend(stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir())

    monkeypatch.setattr(os, "replace", lambda a, b: (look(), replace(a, b), look()))
    monkeypatch.setattr(os, "fsync", lambda file: (look(), fsync(file)))
    old = os.umask(0)
    try:
        Signer(tmp_path / "secret")
        KeyRing(tmp_path / "keys.jsonl").add("a")
    finally:
        os.umask(old)
    assert seen and set(seen) == {0o600}


# -- connections


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    server = Serving(tmp_path)
    server.start()
    yield server
    server.kill()


def connect(serving: Serving, said: bytes = b"") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", serving.port), 5)
    made.sendall(said)
    return made


def answers(serving: Serving) -> float:
    """How long the server takes to answer somebody with a key, in seconds."""
    began = time.monotonic()
    key = base64.b64encode(f"api:{serving.key}".encode()).decode()
    request = urllib.request.Request(serving.address + "/", headers={"Authorization": f"Basic {key}"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert answer.status == 200
    return time.monotonic() - began


def is_closed(one: socket.socket) -> bool:
    one.settimeout(0.01)
    try:
        return one.recv(4096) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


@pytest.mark.slow
def test_connections_that_say_nothing_keep_nobody_out_and_are_closed(serving: Serving) -> None:
    halves = (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"POST /graphql HTTP/1.1\r\nContent-Length: 9\r\n")
    began = time.monotonic()
    idle = [connect(serving, halves[i % len(halves)]) for i in range(2500)]
    assert answers(serving) < 3
    spoken = connect(serving, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\nGET / HT")
    wait_for(lambda: all(map(is_closed, [*idle, spoken])), timeout_s=60)
    assert time.monotonic() - began < connections.HEADERS_S + 30 and answers(serving) < 3
    for one in [*idle, spoken]:
        one.close()


@pytest.mark.slow
def test_a_request_without_a_key_ends_its_connection(serving: Serving) -> None:
    for said in (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"POST /graphql HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\n"):
        with connect(serving, said) as one:
            one.settimeout(5)
            assert b" 401 " in one.recv(65536)
            wait_for(lambda one=one: is_closed(one), timeout_s=5)


@pytest.mark.slow
def test_a_body_that_dribbles_in_is_given_up_and_a_slow_one_is_taken(serving: Serving) -> None:
    key = base64.b64encode(f"api:{serving.key}".encode())
    head = b"POST /graphql HTTP/1.1\r\nHost: a\r\nAuthorization: Basic " + key + b"\r\nContent-Length: "
    query = json.dumps({"query": "query V { viewer { id } }"}).encode()
    with connect(serving, head + b"%d\r\nConnection: close\r\n\r\n" % len(query)) as slow:
        for letter in query:
            time.sleep(0.02)
            slow.sendall(bytes([letter]))
        slow.settimeout(5)
        assert b'"viewer"' in slow.recv(65536) + slow.recv(65536)
    began = time.monotonic()
    with connect(serving, head + b"99999\r\n\r\n{") as stalled:
        stalled.settimeout(bodies.GRACE_S + 20)
        assert b" 408 " in stalled.recv(65536) and time.monotonic() - began < bodies.GRACE_S + 10
        wait_for(lambda: is_closed(stalled), timeout_s=5)


# -- how it starts and ends


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "99999"], "cannot listen on"),
        (["--host", "192.0.2.1"], "cannot listen on"),
        (["--host", "no such host"], "cannot listen on"),
        (["--certificate", "nothing.pem"], "must be a file"),
        (["--certificate", "text.pem"], "must be PEM files"),
        (["--private-key", "text.pem"], "needs the --certificate"),
        (["--entity", "a/b"], "must be of letters"),
        (["--data", "text.pem"], "Choose another: --data"),
        (["--data", "text.pem/below"], "Choose another: --data"),
        (["--crash-after", "nan"], "must be a number above 0"),
        (["--data", "broken"], "is not an entry"),
    ],
)
def test_what_keeps_the_server_from_starting_is_one_line(tmp_path: Path, options: list[str], said: str) -> None:
    (tmp_path / "text.pem").write_text("no certificate")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "server.jsonl").write_bytes(b"\xff\n")
    port = [] if "--port" in options else ["--port", str(free_port())]
    done = subprocess.run([str(BIN / "isaerft-sweep"), "serve", *port, *options], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 or "usage:" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_server_ends_without_a_trace(serving: Serving, number: int) -> None:
    other = subprocess.run([str(BIN / "isaerft-sweep"), "serve", "--port", str(serving.port), "--data", "other"], cwd=serving.folder, capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert other.returncode == 2 and f"cannot listen on 127.0.0.1:{serving.port} (Address already in use)" in other.stderr
    same = subprocess.run([str(BIN / "isaerft-sweep"), "serve", "--port", str(free_port())], cwd=serving.folder, capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert same.returncode == 2 and "in use by another server" in same.stderr
    serving.kill(number)
    assert "Traceback" not in serving.out.read_text()


# -- whatever comes over the wire

HOST = b"Host: 127.0.0.1\r\n"
ODD = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS to a server without
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a b[\r\nAuthorization: KEY\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: [::1\r\nAuthorization: KEY\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\nAuthorization: KEY\r\n\r\n",
    b"GET http://evil/ HTTP/1.1\r\n" + HOST + b"Authorization: KEY\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",
    b"CONNECT a:1 HTTP/1.1\r\n" + HOST + b"\r\n",
    b"GET /%ff%fe%00 HTTP/1.1\r\n" + HOST + b"Authorization: KEY\r\n\r\n",
    b"GET /local/p/runs/%00 HTTP/1.1\r\n" + HOST + b"Authorization: KEY\r\n\r\n",
    b"GET /artifactsV2/a/b/%zz/%00/ff/x HTTP/1.1\r\n" + HOST + b"Authorization: KEY\r\n\r\n",
    b"PUT /uploads/runs/a/b/c/d?until=9&signature=\xff HTTP/1.1\r\n" + HOST + b"\r\n",
    b"PUT /uploads/%ff?until=%ff&signature=%ff HTTP/1.1\r\n" + HOST + b"\r\n",
    b"POST /graphql HTTP/1.1\r\n" + HOST + b"Authorization: KEY\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /graphql HTTP/1.1\r\n" + HOST + b"Authorization: KEY\r\nContent-Length: -1\r\n\r\n",
    b"POST /graphql HTTP/1.1\r\n" + HOST + b"Authorization: KEY\r\nContent-Length: 99999999999999999999999\r\n\r\n",
    b"POST /graphql HTTP/1.1\r\n" + HOST + b"Authorization: KEY\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /graphql HTTP/1.1\r\n" + HOST + b"Authorization: KEY\r\nContent-Length: 2\r\n\r\n\xff\xfe",
    b"POST /graphql HTTP/1.1\r\n" + HOST + b"Authorization: KEY\r\nOrigin: \xff\r\nContent-Length: 2\r\n\r\n{}",
    b"GET / HTTP/1.1\r\n" + HOST + b"Authorization: Basic \xff\xfe\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + HOST + b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: a\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
    b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
]


@pytest.mark.slow
def test_nothing_that_comes_over_the_wire_ends_the_server_or_shows_a_trace(serving: Serving) -> None:
    key = b"Basic " + base64.b64encode(f"api:{serving.key}".encode())
    random = Random(0)
    good = b"GET / HTTP/1.1\r\n" + HOST + b"Authorization: " + key + b"\r\n\r\n"
    mutated = []
    for _ in range(200):
        letters = bytearray(good)
        for _ in range(random.randint(1, 5)):
            letters[random.randrange(len(letters))] = random.randrange(256)
        mutated.append(bytes(letters))
    for said in [*(odd.replace(b"KEY", key) for odd in ODD), *mutated]:
        one = connect(serving)
        one.settimeout(0.5)
        try:
            one.sendall(said)
            answer = one.recv(1 << 20)
        except (TimeoutError, ConnectionError):
            answer = b""  # it waits for the rest, or has closed
        finally:
            one.close()
        assert b"Traceback" not in answer and b" 500 " not in answer[:20], (said, answer)
    assert answers(serving) < 3
    said_lines = serving.out.read_text()
    assert "Traceback" not in said_lines and "Exception" not in said_lines, said_lines
