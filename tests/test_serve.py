"""The server's answers, one by one: who may ask, what is refused, what is handed out. What is on the disk: test_serve_disk."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.serve_client import AGENT, BEAT, BUCKET, CONFIG, CREATE, RESUME, STATE, Client

from isaerft_sweep.errors import FolderError
from isaerft_sweep.serve.keys import KeyRing
from isaerft_sweep.serve.serve_command import is_loopback
from isaerft_sweep.serve.server import Server

# -- who may ask


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Basic",
        "Basic !!!",
        "Basic " + base64.b64encode(b"api:" + b"k" * 40).decode(),
        "Bearer x",
        "Basic " + base64.b64encode(b"\xff\xfe").decode(),
    ],
)
@pytest.mark.parametrize("path", ["/graphql", "/files/local/p/r/file_stream"])
def test_a_wrong_key_is_refused_everywhere(client: Client, header: str | None, path: str) -> None:
    answer = client.http.post(path, json={}, headers={"Authorization": header} if header is not None else {})
    assert answer.status_code == 401 and "WANDB_API_KEY" in answer.json()["error"]
    assert client.http.get("/", headers={"Authorization": header} if header else {}).status_code == 401


def test_another_site_s_page_cannot_ask_in_a_browser_s_name(client: Client) -> None:
    body = {"query": "query Viewer { viewer { id } }"}
    for origin, status in ((None, 200), ("http://testserver", 200), ("https://evil.example", 403), ("null", 403)):
        headers = {**client.headers, **({"Origin": origin} if origin else {})}
        assert client.http.post("/graphql", json=body, headers=headers).status_code == status


def test_keys_are_kept_as_hashes_and_can_be_revoked(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.jsonl")
    key, other = ring.add("a"), ring.add("b")
    assert len(key) == 40 and key != other
    text = (tmp_path / "keys.jsonl").read_text()
    assert key not in text and other not in text
    assert (tmp_path / "keys.jsonl").stat().st_mode & 0o077 == 0
    again = KeyRing(tmp_path / "keys.jsonl")
    assert again.user_of(key) == "a" and again.user_of(other) == "b" and again.user_of(key[:-1]) is None
    again.revoke("a")
    assert KeyRing(tmp_path / "keys.jsonl").user_of(key) is None and KeyRing(tmp_path / "keys.jsonl").user_of(other) == "b"


def test_one_folder_has_one_server(client: Client) -> None:
    with pytest.raises(FolderError, match="in use by another server"):
        Server(client.folder, "local")


def test_what_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.8.8.8")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org")))


# -- what is refused


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("method: [", "not valid YAML"),
        ("hello", "must be a mapping"),
        ("{method: magic, parameters: {a: {value: 1}}}", "method must be one of grid, random, bayes"),
        ("{method: grid, parameters: {a: {min: 0.0, max: 1.0}}}", "grid needs a finite set"),
        ("{method: random, parameters: {a: {min: 2, max: 1}}}", "min must not be above max"),
        ("{method: random, parameters: {orpo.betta: {value: 1}}, program: isaerft_sweep/launch.py, metric: {name: eval/nll_loss}}", "Did you mean 'orpo.beta'"),
        ("{method: random, parameters: {orpo.beta: {value: 1}}, program: isaerft_sweep/launch.py, metric: {name: los}}", "not logged by any trial"),
        ("[" * 3000, "nested too deeply"),
    ],
)  # fmt: skip
def test_a_bad_sweep_file_is_refused_with_the_reason(client: Client, config: str, said: str) -> None:
    answer = client.ask(CREATE, c=config, p="p")
    assert said in answer["errors"][0]["message"] and not client.server.sweeps


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("query {", "Syntax Error"),
        ("query Magic { magic }", "Cannot query field 'magic'"),
        (
            "mutation DeleteRun($id: ID!) { deleteRun(input: {id: $id}) { clientMutationId } }",
            "Cannot query field 'deleteRun'",
        ),
        ("query A { viewer { id } } query B { viewer { id } }", "Must provide operation name"),
        ('query { project(name: "nothere") { id name } viewer { nme } }', "Did you mean 'name'"),
        ("query { " + "viewer { " * 3000, "nested too deeply"),
    ],
)
def test_an_operation_that_is_not_known_is_an_error_and_logged(
    client: Client, query: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = client.ask(query, id="x")
    assert answer["status"] == 200 and answer["data"] is None
    assert said in answer["errors"][0]["message"] and "GraphQL" in caplog.text


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"query": 1}', b'{"query": "{viewer{id}}", "variables": []}', b"\xff", b"[" * 100_000],
)
def test_a_body_that_is_no_request_is_refused(client: Client, body: bytes) -> None:
    assert client.http.post("/graphql", content=body, headers=client.headers).status_code == 400


def test_a_body_that_is_too_large_is_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isaerft_sweep.serve.bodies.MAX_BODY", 1000)
    assert client.http.post("/graphql", content=b"x" * 1001, headers=client.headers).status_code == 413
    pieces = (b"x" * 100 for _ in range(100))
    answer = client.http.post("/graphql", content=pieces, headers=client.headers)
    assert answer.status_code == 413 and "at most 1000 bytes" in answer.json()["error"], "without a length too"


def test_what_is_not_there_is_named(client: Client) -> None:
    assert client.ask(AGENT, s="abcd1234")["errors"][0]["message"] == "there is no sweep local/p/abcd1234 on this server."
    answer = client.ask(BEAT, id="nobody", r="{}")
    assert answer["status"] == 404, "an agent takes this alone for a sweep that is gone"
    assert client.stream("stale", [{"_step": 0}]).status_code == 404
    assert client.get('query { project(name: "nothere") { id } }') == {"project": None}


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "a/b", ".", "..", "x" * 200, "a\0b", "-x"])
def test_names_cannot_leave_the_folder(client: Client, name: str) -> None:
    answer = client.ask(BUCKET, n=name, c="{}")
    assert "must be of letters" in answer["errors"][0]["message"]
    assert not list(client.folder.parent.rglob("passwd*"))


@pytest.mark.parametrize(
    "files",
    [{"wandb-history.jsonl": {"offset": 0, "content": ["{"]}}, {"wandb-history.jsonl": {"offset": -1, "content": []}},
     {"wandb-summary.json": {"offset": 0, "content": ["3"]}}, {"output.log": {"offset": 0, "content": [3]}}, {"output.log": 3}, []],
)  # fmt: skip
def test_a_bad_piece_of_a_stream_changes_nothing(client: Client, files: Any) -> None:
    client.begin("r1")
    client.stream("r1", [{"_step": 0, "a": 1}])
    answer = client.http.post("/files/local/p/r1/file_stream", json={"files": files}, headers=client.headers)
    assert answer.status_code == 400
    assert client.run("r1")["historyLineCount"] == 1


# -- what is handed out


def test_agents_get_different_points_in_the_file_s_shape_and_then_are_dismissed(client: Client) -> None:
    sweep = client.sweep(cap=3)
    first, second = client.agent(sweep), client.agent(sweep)
    commands = [client.beat(first)[0], client.beat(second)[0]]
    assert [c["type"] for c in commands] == ["run", "run"]
    assert set(commands[0]["args"]) == {"lr", "net"} and set(commands[0]["args"]["net"]["value"]) == {"kind"}
    assert commands[0]["args"] != commands[1]["args"] and commands[0]["program"] == "train.py"
    for agent, command in ((first, commands[0]), (second, commands[1])):
        name = command["run_id"]
        client.begin(name, sweep)
        assert client.beat(agent, name) == []
        client.stream(name, [{"_step": 0, "loss": 1.0}], summary={"loss": 1.0}, complete=True, exitcode=0)
        assert client.run(name)["state"] == "finished"
    third = client.beat(first)[0]
    assert client.beat(second) == [{"type": "exit"}], "nothing is left for it, and nobody is missed"
    client.begin(third["run_id"], sweep)
    client.stream(third["run_id"], [], complete=True, exitcode=3)
    assert client.run(third["run_id"])["state"] == "failed"
    assert client.beat(first) == [{"type": "exit"}]
    assert client.server.sweeps[sweep["name"]].state == "FINISHED"


def test_a_run_that_nobody_hears_of_has_crashed_and_is_handed_out_again_three_times_in_all(
    client: Client, clock: Callable[[float], None]
) -> None:
    sweep = client.sweep(cap=1)
    agent = client.agent(sweep)
    command = client.beat(agent)[0]
    name = command["run_id"]
    for attempt in range(3):
        client.begin(name, sweep)
        client.stream(name, [{"_step": attempt}], offset=attempt)
        clock(60)
        client.server.registry.watch()
        assert client.run(name)["state"] == "running", "not so soon"
        clock(60)
        client.server.registry.watch()
        assert client.run(name)["state"] == "crashed"
        again = client.beat(agent)
        if attempt < 2:
            assert again[0]["run_id"] == name and again[0]["type"] == "resume" and again[0]["args"] == command["args"]
            client.get(RESUME, n=name)
    assert again == [{"type": "exit"}], "it is given up"


def test_while_its_agent_lists_it_a_silent_run_lives(client: Client, clock: Callable[[float], None]) -> None:
    sweep = client.sweep()
    agent = client.agent(sweep)
    name = client.beat(agent)[0]["run_id"]
    for _ in range(5):
        clock(60)
        client.beat(agent, name)
        client.server.registry.watch()
    assert client.run(name)["state"] == "pending"


def test_a_lost_answer_is_given_again(client: Client, clock: Callable[[float], None]) -> None:
    sweep = client.sweep(cap=1)
    agent = client.agent(sweep)
    lost = client.beat(agent)[0]
    assert client.beat(agent) == [], "it may be about to start"
    clock(5)
    assert client.beat(agent)[0]["run_id"] == lost["run_id"]


def test_a_preempted_run_goes_on_with_the_same_id_when_its_agent_has_let_go(client: Client) -> None:
    sweep = client.sweep(cap=1)
    agent, other = client.agent(sweep), client.agent(sweep)
    name = client.beat(agent)[0]["run_id"]
    client.begin(name, sweep)
    client.stream(name, [{"_step": 0}, {"_step": 1}], preempting=True)
    assert client.run(name)["state"] == "preempting"
    client.begin(name, sweep)
    assert client.run(name)["state"] == "preempting", "a late word of the old process changes nothing"
    client.beat(agent, name)
    client.stream(name, [], complete=True, exitcode=1)
    assert client.run(name)["state"] == "preempted"
    assert client.beat(other) == [], "its launch may go on with it by itself"
    client.beat(agent, name)
    again = client.beat(agent)[0]
    assert again["run_id"] == name and again["type"] == "resume"
    resumed = client.get(RESUME, n=name)["model"]["bucket"]
    assert resumed["historyLineCount"] == 2 and json.loads(json.loads(resumed["historyTail"])[0])["_step"] == 1
    assert "t" in json.loads(resumed["wandbConfig"])
    client.begin(name, sweep)
    client.stream(name, [{"_step": 2}], offset=2, complete=True, exitcode=0)
    assert [json.loads(row)["_step"] for row in client.run(name)["history"]] == [0, 1, 2]


def test_a_program_that_begins_again_without_resuming_begins_anew(client: Client, clock: Callable[[float], None]) -> None:
    sweep = client.sweep(cap=1)
    agent = client.agent(sweep)
    name = client.beat(agent)[0]["run_id"]
    client.begin(name, sweep)
    client.stream(name, [{"_step": 0, "a": 1}, {"_step": 1, "a": 1}])
    clock(200)
    client.server.registry.watch()
    assert client.beat(agent)[0]["run_id"] == name
    client.begin(name, sweep)
    client.stream(name, [{"_step": 0, "a": 2}])
    assert [json.loads(row) for row in client.run(name)["history"]] == [{"_step": 0, "a": 2}]


def test_pause_resume_stop_and_cancel(client: Client, clock: Callable[[float], None]) -> None:
    sweep = client.sweep()
    agent = client.agent(sweep)
    client.get(STATE, id=sweep["id"], s="PAUSED")
    assert client.beat(agent) == []
    client.get(STATE, id=sweep["id"], s="RUNNING")
    name = client.beat(agent)[0]["run_id"]
    client.begin(name, sweep)
    client.get(STATE, id=sweep["id"], s="FINISHED")
    assert client.beat(agent, name) == [], "a stopped sweep lets its runs end"
    client.get(STATE, id=sweep["id"], s="CANCELED")
    assert client.stream(name, [{"_step": 0}]).json()["stopped"] is True
    assert client.beat(agent, name) == [], "the run has been told itself"
    clock(80)
    assert client.beat(agent, name) == [{"type": "stop", "run_id": name}], "it does not listen"
    assert client.beat(agent, name) == [], "told twice, the agent would kill it in the middle of its checkpoint"
    client.stream(name, [], complete=True, exitcode=1, preempting=True)
    assert client.run(name)["state"] == "killed", "and never handed out again"
    assert client.beat(agent) == [{"type": "exit"}]
    assert "must be one of" in client.ask(STATE, id=sweep["id"], s="SLEEPING")["errors"][0]["message"]


def test_early_termination_stops_the_bad_run_and_revives_it_when_it_was_good(client: Client) -> None:
    sweep = client.sweep(more="early_terminate: {type: hyperband, min_iter: 1, eta: 2}", cap=4)
    agents = [client.agent(sweep) for _ in range(4)]
    names = [client.beat(agent)[0]["run_id"] for agent in agents]
    for name in names:
        client.begin(name, sweep)

    def log(i: int, step: int, loss: float) -> bool:
        return bool(client.stream(names[i], [{"_step": step, "loss": loss}], offset=step - 1).json().get("stopped"))

    assert not log(0, 1, 1.0), "the first goes on"
    assert log(1, 1, 2.0), "worse than half of two"
    client.stream(names[1], [], complete=True, exitcode=255)
    assert client.run(names[1])["state"] == "killed" and client.run(names[1])["stopped"]
    assert log(2, 1, 3.0) and log(3, 1, 4.0)
    for i in (2, 3):
        client.stream(names[i], [], complete=True, exitcode=255)
    again = client.beat(agents[1])
    assert again[0]["run_id"] == names[1] and again[0]["type"] == "resume", "two of four may go on, and it is the second"
    assert not client.run(names[1])["stopped"]


def test_a_run_that_was_stopped_early_can_be_revived_though_all_others_have_ended(client: Client) -> None:
    sweep = client.sweep(cap=4, more="early_terminate: {type: hyperband, min_iter: 2, eta: 2}")
    agent, names = client.agent(sweep), []
    for curve in ([1.0, 1.0], [2.0, 2.0], [5.0, 5.0], [0.5, 9.0]):
        name = client.beat(agent)[0]["run_id"]
        names.append(name)
        client.begin(name, sweep)
        client.beat(agent, name)
        for step, loss in enumerate(curve, 1):
            answer = client.stream(name, [{"_step": step, "loss": loss}], offset=step - 1, summary={"loss": loss})
        client.stream(name, [], complete=True, exitcode=int(answer.json().get("stopped", False)))
        client.server.registry.watch()
    states = [client.run(name)["state"] for name in names]
    assert states == ["finished", "killed", "killed", "finished"]
    again = client.beat(agent)[0]
    assert (again["type"], again["run_id"]) == ("resume", names[1])


def test_the_stop_button(client: Client) -> None:
    sweep = client.sweep(cap=1)
    agent = client.agent(sweep)
    name = client.beat(agent)[0]["run_id"]
    client.begin(name, sweep)
    client.get("mutation StopRun($id: ID!) { stopRun(input: {id: $id}) { success } }", id=client.run(name)["id"])
    assert client.stream(name, []).json()["stopped"] is True
    client.stream(name, [], summary={"state": "pruned"}, complete=True, exitcode=0)
    assert client.run(name)["state"] == "killed" and client.beat(agent) == [{"type": "exit"}]


def test_a_run_that_had_ended_before_it_heard_of_its_stop_has_finished(client: Client) -> None:
    sweep = client.sweep(cap=1)
    agent = client.agent(sweep)
    name = client.beat(agent)[0]["run_id"]
    client.begin(name, sweep)
    client.server.stop_run(next(iter(client.server.runs.values())))
    client.stream(name, [], summary={"loss": 0.5, "state": "completed"}, complete=True, exitcode=0)
    assert client.run(name)["state"] == "finished"
    assert client.server.sweeps[sweep["name"]].records[0].metric == 0.5


def test_a_sweep_keeps_its_question(client: Client) -> None:
    sweep = client.sweep(cap=1)
    update = "mutation UpsertSweep($id: ID, $c: String) { upsertSweep(input: {id: $id, config: $c}) { sweep { runCountExpected } } }"
    larger = CONFIG.format(method="random", cap=5, more="")
    assert client.get(update, id=sweep["id"], c=larger)["upsertSweep"]["sweep"]["runCountExpected"] == 5
    answer = client.ask(update, id=sweep["id"], c=larger.replace("max: 1.0", "max: 2.0"))
    assert "keeps its settings" in answer["errors"][0]["message"]
    assert client.server.sweeps[sweep["name"]].cap == 5


def test_a_sweep_whose_agents_have_left_is_finished_and_a_larger_cap_opens_it_again(
    client: Client, clock: Callable[[float], None]
) -> None:
    sweep = client.sweep(cap=1)
    name = client.beat(client.agent(sweep))[0]["run_id"]  # wandb agent --count 1: it never asks again
    client.begin(name, sweep)
    client.server.registry.watch()
    assert client.server.sweeps[sweep["name"]].state == "RUNNING"
    client.stream(name, [{"_step": 0}], summary={"loss": 1.0}, complete=True, exitcode=0)
    client.server.registry.watch()
    assert client.server.sweeps[sweep["name"]].state == "RUNNING", "its agent may still ask"
    clock(200)
    client.server.registry.watch()
    assert client.server.sweeps[sweep["name"]].state == "FINISHED"
    update = "mutation UpsertSweep($id: ID, $c: String) { upsertSweep(input: {id: $id, config: $c}) { sweep { state } } }"
    for cap, state in ((1, "FINISHED"), (2, "RUNNING")):
        config = CONFIG.format(method="random", cap=cap, more="")
        assert client.get(update, id=sweep["id"], c=config)["upsertSweep"]["sweep"]["state"] == state
    assert client.beat(client.agent(sweep))[0]["type"] == "run"
    client.get(STATE, id=sweep["id"], s="FINISHED")  # wandb sweep --stop
    assert (
        client.get(update, id=sweep["id"], c=config + "\ndescription: a word")["upsertSweep"]["sweep"]["state"] == "FINISHED"
    )
    assert client.beat(client.agent(sweep)) == [{"type": "exit"}]


# -- what wandb.Api asks


def test_filters_and_orders(client: Client) -> None:
    for i in range(5):
        client.begin(f"r{i}")
        client.stream(
            f"r{i}",
            [],
            summary={"loss": [3.0, 1.0, 2.0, "NaN", 0.5][i]},
            **({"complete": True, "exitcode": i % 2} if i < 4 else {}),
        )
    query = 'query Runs($f: JSONString, $o: String, $n: Int, $a: String) { project(name: "p") { runCount(filters: $f) runs(filters: $f, order: $o, first: $n, after: $a) { edges { node { name } cursor } pageInfo { hasNextPage endCursor } } } }'

    def names(f: Any = None, o: str | None = None) -> list[str]:
        found = client.get(query, f=json.dumps(f) if f else None, o=o)["project"]["runs"]["edges"]
        return [edge["node"]["name"] for edge in found]

    assert names(o="+summary_metrics.loss")[:4] == ["r4", "r1", "r2", "r0"]
    assert names(o="-summary_metrics.loss") == ["r0", "r2", "r1", "r4", "r3"], "what is no number is last either way"
    assert names({"state": "running"}) == ["r4"] and names({"state": {"$ne": "running"}}) == ["r0", "r1", "r2", "r3"]
    assert names({"$or": [{"name": "r1"}, {"summary_metrics.loss": {"$gt": 2.5}}]}) == ["r0", "r1"]
    assert names({"$and": [{"state": {"$in": ["finished"]}}, {"name": {"$nin": ["r0"]}}]}) == ["r2"]
    assert names(o="+state,-name") == names(o="+state, -name") == names(o="state,-name") == ["r3", "r1", "r2", "r0", "r4"]
    for i in range(5):
        client.stream(f"r{i}", [], summary={"a, b": -i})
    assert names(o="+summary_metrics.a, b,+name") == ["r4", "r3", "r2", "r1", "r0"], "a metric's name may have commas"
    page = client.get(query, n=2)["project"]["runs"]
    rest = client.get(query, n=100, a=page["pageInfo"]["endCursor"])["project"]["runs"]
    assert len(page["edges"]) == 2 and page["pageInfo"]["hasNextPage"] and len(rest["edges"]) == 3
    assert "cannot be filtered" in client.ask(query, f='{"secret": 1}')["errors"][0]["message"]
    assert "cannot have '$where'" in client.ask(query, f='{"name": {"$where": 1}}')["errors"][0]["message"]


def test_files_need_a_signed_address_and_stay_in_their_folder(client: Client) -> None:
    client.begin("r1")
    create = 'mutation CreateRunFiles($f: [String!]!) { createRunFiles(input: {entityName: "local", projectName: "p", runName: "r1", files: $f}) { runID files { name uploadUrl } } }'
    url = client.get(create, f=["media/a.txt"])["createRunFiles"]["files"][0]["uploadUrl"]
    assert client.http.put(url, content=b"hello").status_code == 200
    files = 'query RunFiles { project(name: "p") { run(name: "r1") { fileCount files { edges { node { name sizeBytes directUrl } } } } } }'
    found = client.get(files)["project"]["run"]["files"]["edges"][0]["node"]
    assert found["name"] == "media/a.txt" and client.http.get(found["directUrl"]).content == b"hello"
    assert client.http.get(url).status_code == 403 and client.http.put(found["directUrl"], content=b"x").status_code == 403
    assert client.http.put(url.replace("a.txt", "b.txt"), content=b"x").status_code == 403
    assert client.http.put(url, content=b"x" * ((1 << 20) + 1)).status_code == 413
    assert client.http.get(found["directUrl"]).content == b"hello", "an upload that failed leaves the old file"
    nameless = client.get(create, f=[""])["createRunFiles"]["files"][0]["uploadUrl"]
    assert client.http.put(nameless, content=b"x").status_code in (400, 404)
    escaping = client.get(create, f=["../../../../escaped.txt"])["createRunFiles"]["files"][0]["uploadUrl"]
    assert client.http.put(escaping, content=b"x").status_code in (400, 403, 404)
    assert not list(client.folder.parent.rglob("escaped.txt"))


def test_the_pages_for_people(client: Client) -> None:
    sweep = client.sweep(more="name: <b>bold</b>")
    agent = client.agent(sweep)
    name = client.beat(agent)[0]["run_id"]
    client.begin(name, sweep)
    client.stream(name, [{"_step": i, "loss": 1.0 / (i + 1), "other": i} for i in range(20)], summary={"loss": 0.05})
    for path, wanted in (
        ("/", sweep["name"]),
        ("/local/p", name),
        (f"/local/p/sweeps/{sweep['name']}", "plotly-graph-div"),
        (f"/local/p/runs/{name}", "polyline"),
    ):
        answer = client.http.get(path, headers=client.headers)
        assert answer.status_code == 200 and wanted in answer.text and "<b>bold" not in answer.text
        scripts = re.findall(r"<script([^>]*)>", answer.text)
        assert all(' src="/static/' in one or one == ' type="application/json" class="figure"' for one in scripts)
        assert "default-src 'none'; script-src 'self'; " in answer.headers["Content-Security-Policy"]
    assert client.http.get("/local/p/runs/nothere", headers=client.headers).status_code == 404


def test_a_single_value_is_a_dot_and_a_silent_agent_is_called_so(client: Client) -> None:
    sweep = client.sweep()
    agent = client.agent(sweep)
    name = client.beat(agent)[0]["run_id"]
    client.begin(name, sweep)
    client.stream(name, [{"_step": 0, "alone": 1.0}, {"_step": 1, "zero": 0.5}, {"_step": 2, "zero": 0.4}])
    page = client.http.get(f"/local/p/runs/{name}", headers=client.headers).text
    assert page.index("zero, from 0.4 to 0.5") < page.index("alone, from 1 to 1") < page.index('"main point"'), page
    assert page.count('"main point"') == 1
    at_sweep = f"/local/p/sweeps/{sweep['name']}"
    assert "silent" not in client.http.get(at_sweep, headers=client.headers).text
    client.server.agents[agent].last_seen_wall -= 3600  # the server was down for an hour
    assert "silent" in client.http.get(at_sweep, headers=client.headers).text
