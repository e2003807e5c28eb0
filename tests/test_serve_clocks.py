"""Clocks that are wrong: a client's, and the server's own that jumps."""

from __future__ import annotations

import time

import pytest
from helpers.serve_client import Client

DAY_S = 86_400


def test_rows_with_a_far_off_time_are_kept_as_they_are(client: Client) -> None:
    sweep = client.sweep()
    name = client.beat(client.agent(sweep))[0]["run_id"]
    client.begin(name, sweep)
    times = [time.time() + days * DAY_S for days in (-4000, 0, 400)]
    rows = [{"_step": step, "_timestamp": at, "loss": 1.0 / (1 + step)} for step, at in enumerate(times)]
    assert client.stream(name, rows).status_code == 200
    assert client.run(name)["historyLineCount"] == 3
    client.server.registry.watch()
    assert client.run(name)["state"] == "running", "who is alive is told by when it is heard of, not by what it says"
    page = client.http.get(f"/local/p/runs/{name}", headers=client.headers)
    assert page.status_code == 200 and "polyline" in page.text


@pytest.mark.parametrize("jump_s", [-2 * DAY_S, 2 * DAY_S])
def test_the_servers_clock_jumps(jump_s: float, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = client.sweep()
    agent = client.agent(sweep)
    name = client.beat(agent)[0]["run_id"]
    client.begin(name, sweep)
    create = 'mutation CreateRunFiles($f: [String!]!) { createRunFiles(input: {entityName: "local", projectName: "p", runName: "RUN", files: $f}) { files { uploadUrl } } }'

    def address() -> str:
        found = client.get(create.replace("RUN", name), f=["a.txt"])["createRunFiles"]["files"][0]
        return str(found["uploadUrl"])

    before, real = address(), time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    client.server.registry.watch()
    assert client.run(name)["state"] == "running", "nobody is taken for dead"
    assert client.stream(name, [{"_step": 0, "loss": 1.0}], summary={"loss": 1.0}).status_code == 200
    old = client.http.put(before, content=b"x").status_code
    assert old == (403 if jump_s > 0 else 200), "an old address is refused; wandb asks for another"
    assert client.http.put(address(), content=b"x").status_code == 200
    assert client.stream(name, [], complete=True, exitcode=0).status_code == 200
    assert client.beat(agent)[0]["run_id"] != name and client.run(name)["state"] == "finished"
    assert "run" in client.http.get(f"/local/p/sweeps/{sweep['name']}", headers=client.headers).text
