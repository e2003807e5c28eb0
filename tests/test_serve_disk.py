"""What the server has acknowledged is on the disk: after a crash, a restart, a full disk, and when a client comes back."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from helpers.serve_client import BEAT, RESUME, Client, facts
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from isaerft_sweep.errors import FolderError
from isaerft_sweep.serve import runs
from isaerft_sweep.serve.server import Server


class Drive:
    """Random steps of agents and runs."""

    def __init__(self, client: Client) -> None:
        self.client, self.agents, self.runs, self.rows = client, [], {}, {}
        self.sweep = client.sweep("bayes", cap=6, more="early_terminate: {type: hyperband, min_iter: 2, eta: 2}")

    def step(self, what: int, which: int) -> None:
        client = self.client
        if what == 0 or not self.agents:
            self.agents.append(client.agent(self.sweep))
        elif what == 1:
            agent = self.agents[which % len(self.agents)]
            mine = [run for run, owner in self.runs.items() if owner == agent]
            for command in client.beat(agent, *mine):
                if command["type"] in ("run", "resume"):
                    self.runs[command["run_id"]] = agent
                    client.begin(command["run_id"], self.sweep)
        elif self.runs:
            name = sorted(self.runs)[which % len(self.runs)]
            count = client.run(name)["historyLineCount"]
            if what == 2:
                client.stream(
                    name, [{"_step": count + 1, "loss": (which * 37 % 11) / 7}], offset=count, summary={"loss": which / 7}
                )
            else:
                client.stream(name, [], complete=True, exitcode=(0, 0, 1)[which % 3], preempting=which % 5 == 0)
                del self.runs[name]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), max_size=40), st.binary(max_size=40))
def test_nothing_that_was_acknowledged_is_lost_in_a_crash(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int]], torn: bytes
) -> None:
    client = Client(tmp_path_factory.mktemp("data"))
    drive = Drive(client)
    for what, which in steps:
        drive.step(what, which)
    copy = tmp_path_factory.mktemp("copy") / "data"
    shutil.copytree(client.folder, copy)  # as a kill -9 leaves it
    for log in [copy / "server.jsonl", *copy.glob("runs/*/*/*.jsonl"), *copy.glob("sweeps/*/journal.jsonl")]:
        with log.open("ab") as file:
            file.write(torn.replace(b"\n", b""))
    again = Server(copy, "local")
    try:
        assert facts(again) == facts(client.server)
        name = drive.sweep["name"]
        if client.server.sweeps[name].assign_trial("a") is not None:
            ours, theirs = client.server.sweeps[name].records, None
            again.sweeps[name].assign_trial("a")
            theirs = again.sweeps[name].records
            assert [dict(r.point.params) for r in theirs.values()] == [dict(r.point.params) for r in ours.values()], (
                "the same next point"
            )
    finally:
        again.close()
        client.server.close()


def test_rows_sent_again_are_kept_once(client: Client) -> None:
    client.begin("r1")
    rows = [{"_step": i, "loss": float(i)} for i in range(6)]
    client.stream("r1", rows[:3])
    client.stream("r1", rows[:5])
    client.stream("r1", rows[5:], offset=5)
    assert [json.loads(row)["_step"] for row in client.run("r1")["history"]] == list(range(6))


def test_a_run_that_is_synced_on_top_of_its_beginning_has_every_step_once(client: Client) -> None:
    client.begin("r1")
    client.stream("r1", [{"_step": i, "loss": float(i)} for i in range(3)])
    client.get(RESUME, n="r1")
    client.stream("r1", [{"_step": i, "loss": float(i)} for i in range(4)], offset=3)
    client.stream("r1", [{"_step": i, "loss": float(i)} for i in range(4, 6)], offset=7, complete=True, exitcode=0)
    assert [json.loads(row)["_step"] for row in client.run("r1")["history"]] == list(range(6))


def test_a_broken_line_is_named(client: Client) -> None:
    client.begin("r1")
    copy = client.folder.parent / "copy"
    shutil.copytree(client.folder, copy)
    with (copy / "runs" / "local" / "p" / "r1.jsonl").open("ab") as file:
        file.write(b'{"set": {"magic": 1}, "t": 1}\n')
    with pytest.raises(FolderError, match="line 2 is not a record of a run"):
        Server(copy, "local")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """From so many writes on no write succeeds; a negative number: each does again."""
    left = [-1]
    real = os.fsync

    def fsync(file: int) -> None:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        real(file)

    monkeypatch.setattr("isaerft_sweep.journal.append_log.os.fsync", fsync)

    def after(writes: int) -> None:
        left[0] = writes

    return after


def test_a_full_disk_is_an_error_and_not_an_acknowledgement(client: Client, full_disk: Callable[[int], None]) -> None:
    client.begin("r1")
    client.stream("r1", [{"_step": 0}])
    full_disk(0)
    assert client.stream("r1", [{"_step": 1}], offset=1).status_code == 507
    full_disk(-1)
    assert client.run("r1")["historyLineCount"] == 1
    client.stream("r1", [{"_step": 1}], offset=1)
    assert [json.loads(row)["_step"] for row in client.run("r1")["history"]] == [0, 1]


@pytest.mark.parametrize("writes", range(4), ids=["point", "dispatch", "run", "none"])
def test_a_disk_that_fills_while_a_run_is_handed_out_loses_no_point(
    client: Client, full_disk: Callable[[int], None], writes: int
) -> None:
    sweep = client.sweep(cap=2)
    agent = client.agent(sweep)
    full_disk(writes)
    refused = client.ask(BEAT, id=agent, r="{}")
    assert refused["status"] == (507 if writes < 3 else 200), "wandb's agent asks again at 5xx"
    full_disk(-1)
    commands = client.beat(agent) if writes < 3 else json.loads(refused["data"]["agentHeartbeat"]["commands"])
    again = Server(shutil.copytree(client.folder, client.folder.parent / "copy"), "local")
    assert facts(again) == facts(client.server)
    again.close()
    client.begin(commands[0]["run_id"], sweep)
    other = client.beat(client.agent(sweep))
    assert len({command["run_id"] for command in commands + other}) == 2
    points = [tuple(r.point.params.values()) for r in client.server.sweeps[sweep["name"]].records.values()]
    assert len(points) == len(set(points)) == 2


def test_a_disk_that_fills_as_a_run_ends_takes_its_end_when_it_is_told_again(
    client: Client, full_disk: Callable[[int], None]
) -> None:
    sweep = client.sweep(cap=1)
    name = client.beat(client.agent(sweep))[0]["run_id"]
    client.begin(name, sweep)
    end = {"summary": {"loss": 0.5}, "complete": True, "exitcode": 0}
    for writes in (0, 1, 2):
        full_disk(writes)
        assert client.stream(name, [{"_step": 0, "loss": 0.5}], **end).status_code == 507
    full_disk(-1)
    assert client.stream(name, [{"_step": 0, "loss": 0.5}], **end).status_code == 200
    record = client.server.sweeps[sweep["name"]].record_of(name)
    assert record is not None and record.state == "completed" and record.metric == 0.5
    assert client.run(name)["historyLineCount"] == 1


# -- a client that was cut off comes back


def lost(client: Client, clock: Callable[[float], None], cap: int = 1) -> tuple[dict[str, Any], str, str]:
    """A sweep, an agent and its run, which the network has cut off for too long."""
    sweep = client.sweep(cap=cap)
    agent = client.agent(sweep)
    name = client.beat(agent)[0]["run_id"]
    client.begin(name, sweep)
    client.stream(name, [{"_step": 0, "loss": 3.0}])
    clock(200)
    client.server.registry.watch()
    assert client.run(name)["state"] == "crashed"
    return sweep, agent, name


@pytest.mark.parametrize("ending", [{}, {"complete": True, "exitcode": 0}], ids=["runs on", "has finished"])
def test_a_run_that_comes_back_before_it_was_handed_out_again_goes_on(
    client: Client, clock: Callable[[float], None], ending: dict[str, Any]
) -> None:
    sweep, agent, name = lost(client, clock)
    client.stream(name, [{"_step": 1, "loss": 2.0}], offset=1, summary={"loss": 2.0}, **ending)
    other = client.agent(sweep)
    assert all(command["type"] == "exit" for command in client.beat(other)), "it is not done twice"
    again = Server(shutil.copytree(client.folder, client.folder.parent / "copy"), "local")
    assert facts(again) == facts(client.server)
    again.close()
    if not ending:
        client.beat(agent, name)
        client.stream(name, [], complete=True, exitcode=0)
    record = client.server.sweeps[sweep["name"]].record_of(name)
    assert record is not None and record.state == "completed" and record.metric == 2.0 and record.attempt == 1


def test_a_run_that_was_given_up_and_comes_back_counts(client: Client, clock: Callable[[float], None]) -> None:
    sweep, agent, name = lost(client, clock)
    for step in (1, 2):
        assert client.beat(agent)[0]["run_id"] == name
        client.get(RESUME, n=name)
        client.begin(name, sweep)
        client.stream(name, [{"_step": step, "loss": 2.0}], offset=step)
        clock(200)
        client.server.registry.watch()
    record = client.server.sweeps[sweep["name"]].record_of(name)
    assert record is not None and record.given_up
    client.stream(name, [{"_step": 3, "loss": 1.0}], offset=3, summary={"loss": 1.0}, complete=True, exitcode=0)
    assert (record.state, record.metric) == ("completed", 1.0) and not record.given_up


def test_an_agent_that_comes_back_to_find_its_run_with_another_is_told_to_stop_it(
    client: Client, clock: Callable[[float], None]
) -> None:
    sweep, agent, name = lost(client, clock)
    other = client.agent(sweep)
    assert client.beat(other)[0]["run_id"] == name
    client.get(RESUME, n=name)
    client.begin(name, sweep)
    assert client.beat(agent, name) == [{"type": "stop", "run_id": name}]
    assert client.beat(agent, name) == [], "twice would kill it before it has written its checkpoint"
    assert client.beat(other, name) == []
    client.stream(name, [{"_step": 1, "loss": 1.0}], offset=1, summary={"loss": 1.0}, complete=True, exitcode=0)
    record = client.server.sweeps[sweep["name"]].record_of(name)
    assert record is not None and record.state == "completed" and record.attempt == 2


def test_after_a_restart_an_agent_may_still_be_at_a_run_that_it_tries_again(client: Client) -> None:
    sweep = client.sweep(cap=1)
    agent, other = client.agent(sweep), client.agent(sweep)
    name = client.beat(agent)[0]["run_id"]
    client.begin(name, sweep)
    client.beat(agent, name)
    client.stream(name, [{"_step": 0}], complete=True, exitcode=1)
    restarted = Client(shutil.copytree(client.folder, client.folder.parent / "copy"))
    try:
        restarted.server.registry.watch()
        assert restarted.beat(other) == [], "its agent has not spoken yet"
        restarted.beat(agent, name)
        restarted.get(RESUME, n=name)
        restarted.begin(name, sweep)
        end = {"summary": {"loss": 1.0}, "complete": True, "exitcode": 0}
        restarted.stream(name, [{"_step": 1, "loss": 1.0}], offset=1, **end)
        record = restarted.server.sweeps[sweep["name"]].record_of(name)
        assert record is not None and record.state == "completed" and record.attempt == 1
    finally:
        restarted.server.close()


@pytest.mark.parametrize("last_words", [{"preempting": True, "exitcode": 1}, {"exitcode": 1}], ids=["ours", "another's"])
@pytest.mark.parametrize("when", ["before its first word", "while it runs"])
def test_the_last_words_of_a_run_that_was_cut_off_do_not_end_its_next_attempt(
    client: Client, clock: Callable[[float], None], last_words: dict[str, Any], when: str
) -> None:
    sweep, _, name = lost(client, clock)
    other = client.agent(sweep)
    assert client.beat(other)[0]["run_id"] == name
    if when == "while it runs":
        client.get(RESUME, n=name)
        client.begin(name, sweep)
        client.beat(other, name)
    client.stream(name, [], complete=True, **last_words)  # of the old process, which was told to stop
    client.server.registry.watch()
    if when != "while it runs":
        client.get(RESUME, n=name)
        client.begin(name, sweep)
    client.beat(other, name)
    client.server.registry.watch()
    client.stream(name, [{"_step": 1, "loss": 1.0}], offset=1, summary={"loss": 1.0})
    assert client.run(name)["state"] == "running", "so it can be told to stop"
    assert client.beat(client.agent(sweep)) == [{"type": "exit"}], "nobody else gets it"
    client.stream(name, [], complete=True, exitcode=0)
    record = client.server.sweeps[sweep["name"]].record_of(name)
    assert record is not None and (record.state, record.metric, record.attempt) == ("completed", 1.0, 2)


def test_a_run_that_comes_back_by_resuming_is_not_handed_out_again(client: Client, clock: Callable[[float], None]) -> None:
    sweep, _, name = lost(client, clock)
    client.get(RESUME, n=name)  # launch has started the trial's process again
    client.begin(name, sweep)
    assert client.beat(client.agent(sweep)) == [{"type": "exit"}]
    client.stream(name, [{"_step": 1, "loss": 1.0}], offset=1, summary={"loss": 1.0}, complete=True, exitcode=0)
    record = client.server.sweeps[sweep["name"]].record_of(name)
    assert record is not None and (record.state, record.metric) == ("completed", 1.0)


def test_a_run_that_was_given_up_opens_its_sweep_again_and_is_news_to_the_sampler(
    client: Client, clock: Callable[[float], None]
) -> None:
    sweep = client.sweep("bayes", cap=1)
    agent = client.agent(sweep)
    for step in range(3):
        name = client.beat(agent)[0]["run_id"]
        client.get(RESUME, n=name)
        client.begin(name, sweep)
        client.stream(name, [{"_step": step, "loss": 2.0}], offset=step)
        clock(200)
        client.server.registry.watch()
    served = client.server.sweeps[sweep["name"]]
    assert served.state == "FINISHED" and served.records[0].given_up
    told: list[float | None] = []
    tell = served.sampler.tell
    noted = lambda point, value, *more: told.append(value) or tell(point, value, *more)  # noqa: E731
    served.sampler.tell = noted  # type: ignore[method-assign]
    client.stream(name, [{"_step": 3, "loss": 1.0}], offset=3, preempting=True)
    client.stream(name, [], complete=True, exitcode=1)
    clock(200)
    client.server.registry.watch()
    assert served.state == "RUNNING" and not served.records[0].given_up
    assert client.beat(client.agent(sweep))[0]["run_id"] == name, "it was preempted, and goes on"
    client.get(RESUME, n=name)
    client.begin(name, sweep)
    client.stream(name, [{"_step": 4, "loss": 0.5}], offset=4, summary={"loss": 0.5}, complete=True, exitcode=0)
    model = served.sampler._model
    assert told == [0.5] and model is not None
    assert [value for _, value in model.observed] == [-0.5], "larger is better there"


@pytest.mark.parametrize("told_again", [True, False])
def test_a_disk_that_fills_between_a_run_s_end_and_the_sweep_s_knowledge_of_it(
    client: Client, clock: Callable[[float], None], full_disk: Callable[[int], None], told_again: bool
) -> None:
    sweep = client.sweep(cap=1)
    name = client.beat(client.agent(sweep))[0]["run_id"]
    client.begin(name, sweep)
    rows = [{"_step": 0, "loss": 0.5}]
    full_disk(2)  # the rows and the run's state, not the sweep's journal
    assert client.stream(name, rows, summary={"loss": 0.5}, complete=True, exitcode=0).status_code == 507
    full_disk(-1)
    if told_again:
        client.stream(name, rows, summary={"loss": 0.5}, complete=True, exitcode=0)
    clock(200)
    client.server.registry.watch()
    client.server.registry.watch()
    record = client.server.sweeps[sweep["name"]].record_of(name)
    assert record is not None and (record.state, record.metric) == ("completed", 0.5)
    assert client.server.sweeps[sweep["name"]].state == "FINISHED"


def test_a_decision_to_stop_early_that_the_disk_does_not_take_is_made_again(
    client: Client, full_disk: Callable[[int], None]
) -> None:
    sweep = client.sweep(cap=4, more="early_terminate: {type: hyperband, min_iter: 2, eta: 2}")
    agent = client.agent(sweep)
    for number, losses in enumerate(([1.0, 1.0], [1.1, 1.1], [5.0, 5.0])):
        name = client.beat(agent)[0]["run_id"]
        client.begin(name, sweep)
        rows = [{"_step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
        if number == 2:
            full_disk(1)  # the rows, not the decision
            assert client.stream(name, rows).status_code == 507
            full_disk(-1)
        answer = client.stream(name, rows)
        client.stream(name, [], summary={"loss": losses[-1]}, complete=True, exitcode=0)
    assert answer.json()["stopped"] is True and client.run(name)["historyLineCount"] == 2


def test_a_file_that_the_disk_does_not_take_is_refused_as_such(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.begin("r1")
    create = 'mutation CreateRunFiles($f: [String!]!) { createRunFiles(input: {entityName: "local", projectName: "p", runName: "r1", files: $f}) { files { uploadUrl } } }'
    url = client.get(create, f=["a.txt"])["createRunFiles"]["files"][0]["uploadUrl"]

    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for place in ("os.fsync", "tempfile.mkstemp"):
        with monkeypatch.context() as patch:
            patch.setattr(f"isaerft_sweep.serve.app.{place}", full if place == "os.fsync" else lambda **_: full())
            assert client.http.put(url, content=b"hello").status_code == 507
    assert client.http.put(url, content=b"hello").status_code == 200


# -- long histories


def test_a_long_history_is_read_once_for_all_its_pages(client: Client) -> None:
    runs.rows_in.cache_clear()
    client.begin("r1")
    for start in range(0, 5000, 500):
        client.stream("r1", [{"_step": 3 * i, "loss": float(i)} for i in range(start, start + 500)], offset=start)
    page = (
        'query HistoryPage($low: Int64!, $high: Int64!) { project(name: "p") { run(name: "r1") '
        "{ history(minStep: $low, maxStep: $high, samples: 500) } } }"
    )
    found: list[int] = []
    for low in range(0, 15000, 1000):
        rows = client.get(page, low=low, high=low + 1000)["project"]["run"]["history"]
        found += [json.loads(row)["_step"] for row in rows]
    assert found == list(range(0, 15000, 3)) and runs.rows_in.cache_info().misses == 1
    client.stream("r1", [{"_step": 15000}], offset=5000)
    assert len(client.run("r1")["history"]) == 5001, "it is read again when there is more"


# -- a run that is begun a second time

HOSTED = 'mutation UpsertBucket($n: String) { upsertBucket(input: {name: $n, modelName: "p", host: "h", config: "{}"}) { bucket { id } } }'


@pytest.mark.parametrize("ended", [True, False])
def test_a_second_process_that_does_not_resume_overwrites_the_first_one(client: Client, ended: bool) -> None:
    client.get(HOSTED, n="r1")
    ending = {"complete": True, "exitcode": 0} if ended else {}
    client.stream("r1", [{"_step": i, "loss": 1.0} for i in range(5)], summary={"loss": 1.0, "old": 1}, **ending)
    client.get(HOSTED, n="r1")
    assert client.run("r1")["state"] == "running" and client.run("r1")["historyLineCount"] == 0, (
        "the client counts from here"
    )
    assert len(client.run("r1")["history"]) == 5, "it has sent nothing yet"
    client.stream("r1", [], summary={})
    client.stream("r1", [{"_step": i, "loss": 2.0} for i in range(3)], summary={"loss": 2.0}, complete=True, exitcode=0)
    run = client.run("r1")
    assert [json.loads(row)["loss"] for row in run["history"]] == [2.0] * 3 and run["state"] == "finished"
    assert json.loads(run["summaryMetrics"]) == {"loss": 2.0}
    again = Server(shutil.copytree(client.folder, client.folder.parent / "copy"), "local")
    assert facts(again) == facts(client.server)
    again.close()


@pytest.mark.parametrize("offset", [5, 0])
def test_a_process_that_goes_on_loses_nothing_when_the_server_is_killed_before_it_begins(
    client: Client, offset: int
) -> None:
    client.get(HOSTED, n="r1")
    client.stream("r1", [{"_step": i} for i in range(5)], preempting=True, complete=True, exitcode=1)
    client.get(RESUME, n="r1")
    restarted = Client(shutil.copytree(client.folder, client.folder.parent / "copy"))
    try:
        restarted.get(HOSTED, n="r1")
        assert restarted.run("r1")["state"] == "running"
        restarted.stream("r1", [{"_step": 5}], offset=offset)
        restarted.stream("r1", [{"_step": 6}], offset=offset + 1, complete=True, exitcode=0)
        assert [json.loads(row)["_step"] for row in restarted.run("r1")["history"]] == list(range(7))
    finally:
        restarted.server.close()


def test_a_second_process_that_dies_before_its_first_row_costs_the_third_nothing(client: Client) -> None:
    client.get(HOSTED, n="r1")
    client.stream("r1", [{"_step": i} for i in range(5)], complete=True, exitcode=1)
    client.get(HOSTED, n="r1")
    assert client.get(RESUME, n="r1")["model"]["bucket"]["historyLineCount"] == 5
    client.get(HOSTED, n="r1")
    client.stream("r1", [{"_step": 5}], offset=5)
    assert [json.loads(row)["_step"] for row in client.run("r1")["history"]] == list(range(6))


def test_a_run_s_first_words_that_come_twice_change_nothing(client: Client) -> None:
    rows = [{"_step": i, "loss": 1.0} for i in range(3)]
    for _ in range(2):
        client.get(HOSTED, n="r1")
    for _ in range(2):
        client.stream("r1", rows)
    client.get(
        'mutation U($n: String) { upsertBucket(input: {name: $n, modelName: "p", config: "{\\"a\\": 1}"}) { bucket { id } } }',
        n="r1",
    )
    client.stream("r1", [{"_step": 3, "loss": 1.0}], offset=3)
    assert client.run("r1")["historyLineCount"] == 4


# -- names

NAMES = ("pairs.jsonl", "a", "a.jsonl", "a.jsonl.jsonl", "x.jsonl", "server", "runs", "a.b-c_d")


def test_runs_and_projects_may_have_any_name_that_is_allowed(client: Client) -> None:
    bucket = 'mutation UpsertBucket($n: String, $p: String) { upsertBucket(input: {name: $n, modelName: $p, config: "{}"}) { bucket { id } } }'
    create = 'mutation CreateRunFiles($n: String!, $p: String!) { createRunFiles(input: {entityName: "local", projectName: $p, runName: $n, files: ["pairs.jsonl", "b/c"]}) { files { name uploadUrl } } }'
    for project in ("p", "p.jsonl"):
        for name in NAMES:
            client.get(bucket, n=name, p=project)
            for file in client.get(create, n=name, p=project)["createRunFiles"]["files"]:
                assert client.http.put(file["uploadUrl"], content=f"{project} {name} {file['name']}").status_code == 200
    again = Server(shutil.copytree(client.folder, client.folder.parent / "copy"), "local")
    assert facts(again) == facts(client.server) and len(again.runs) == 2 * len(NAMES)
    for run in again.runs.values():
        found = {
            path.relative_to(again.files_of(run)).as_posix(): path.read_text()
            for path in again.files_of(run).rglob("*")
            if path.is_file()
        }
        assert found == {name: f"{run.key.project} {run.key.name} {name}" for name in ("pairs.jsonl", "b/c")}
    again.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=40))
@example("100%.txt")
@example("a?b#c d.txt")
@example("%2e%2e")
@example("x\ny\n")
@example(".upload.txt")
@example("é\u2028\u202e")
def test_a_file_of_any_name_comes_back(client: Client, name: str) -> None:
    if len(name.encode()) > 250 or name in (".", ".."):
        return
    client.begin("r1")
    create = 'mutation CreateRunFiles($f: [String!]!) { createRunFiles(input: {entityName: "local", projectName: "p", runName: "r1", files: $f}) { files { name uploadUrl } } }'
    (file,) = client.get(create, f=[f"media/{name}"])["createRunFiles"]["files"]
    assert client.http.put(file["uploadUrl"], content=name.encode()).status_code == 200
    files = 'query RunFiles($f: [String]) { project(name: "p") { run(name: "r1") { files(names: $f) { edges { node { name sizeBytes directUrl } } } } } }'
    (edge,) = client.get(files, f=[f"media/{name}"])["project"]["run"]["files"]["edges"]
    assert edge["node"]["sizeBytes"] == len(name.encode())
    assert client.http.get(edge["node"]["directUrl"]).content == name.encode()


@pytest.mark.parametrize("bad", ["method: magic", "method: [", "- 1", "method: random\nparameters: {a: {min: 2, max: 1}}"])
def test_a_sweep_that_a_newer_version_does_not_take_is_shown_and_keeps_no_other_from_going_on(
    client: Client, bad: str, caplog: pytest.LogCaptureFixture
) -> None:
    old, good = client.sweep(), client.sweep()
    name = client.beat(client.agent(old))[0]["run_id"]
    client.begin(name, old)
    copy = shutil.copytree(client.folder, client.folder.parent / "copy")
    lines = [json.loads(line) for line in (copy / "server.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] == "sweep" and line["id"] == old["name"]:
            line["config"] = bad
    lines.append({"event": "sweep_update", "id": good["name"], "config": bad, "state": None, "t": 1.0})
    (copy / "server.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    restarted = Client(copy)
    try:
        assert "this version rejects" in caplog.text
        assert restarted.beat(restarted.agent(old)) == [{"type": "exit"}]
        assert restarted.beat(restarted.agent(good))[0]["type"] == "run"
        restarted.stream(name, [{"_step": 0, "loss": 1.0}], complete=True, exitcode=0)
        for page in ("/", "/local/p", f"/local/p/sweeps/{old['name']}"):
            assert restarted.http.get(page, headers=restarted.headers).status_code == 200
    finally:
        restarted.server.close()


def test_whatever_fails_gets_one_line_and_its_trace_goes_to_the_log(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client.begin("r1")
    create = 'mutation CreateRunFiles { createRunFiles(input: {entityName: "local", projectName: "p", runName: "r1", files: ["a"]}) { files { uploadUrl } } }'
    url = client.get(create)["createRunFiles"]["files"][0]["uploadUrl"]

    def broken(*_args: Any, **_more: Any) -> None:
        raise ZeroDivisionError("nobody has thought of this")

    for place in (
        "graphql.execute_sync",
        "graphql.checked",
        "server.Server.find_run",
        "pages.overview",
        "app.tempfile.mkstemp",
    ):
        monkeypatch.setattr(f"isaerft_sweep.serve.{place}", broken)
    answers = [
        client.http.post("/graphql", json={"query": "query V { viewer { id } }"}, headers=client.headers),
        client.stream("r1", [{"_step": 0}]),
        client.http.get("/", headers=client.headers),
        client.http.put(url, content=b"x"),
    ]
    assert [answer.status_code for answer in answers] == [200, 500, 500, 500], (
        "a query is not tried again for ever, rows are"
    )
    for answer in answers:
        assert answer.json()["errors"][0]["message"] == "the server could not answer this; its log says why."
        assert "Traceback" not in answer.text and "ZeroDivision" not in answer.text
    assert caplog.text.count("ZeroDivisionError: nobody has thought of this") == 4
    monkeypatch.undo()
    assert client.run("r1")["state"] == "running", "and it goes on"
