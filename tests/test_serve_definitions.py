"""The server reads a sweep of this package's trials as ``launch`` does: what that would refuse is refused at ``wandb sweep``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.serve_client import CREATE, Client

from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.serve.server import Server

COMMAND = ["${env}", "${interpreter}", "-m", "isaerft_sweep.launch", "model=tiny", "${args_no_hyphens}"]


def ours(parameters: dict[str, Any], **more: Any) -> str:
    metric = {"name": "eval/log_odds_chosen", "goal": "maximize"}
    return yaml.safe_dump(
        {"method": "random", "metric": metric, "run_cap": 3, "parameters": parameters, "command": COMMAND, **more}
    )


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"orpo.beta": {"value": -1}}, "orpo.beta must be at least 0 but got -1"),
        ({"adapter.kind": {"values": ["bias", "bogus"]}}, "adapter.kind must be one of bias,"),
        ({"orpo.batch_size": {"distribution": "uniform", "min": 2, "max": 8}}, "takes whole numbers"),
        ({"orpo.beta": {"distribution": "normal", "mu": -3, "sigma": 1}}, "lies mostly beyond"),
        (
            {"adapter.kind": {"value": "linear"}, "adapter.top_k": {"values": [5, 6]}},
            "the sweep has a point that is not valid",
        ),
        ({"orpo.betta": {"value": 1}}, "must be a config key but got 'orpo.betta'"),
        ({"orpo.beta": {"values": [1, 1.0]}}, "different from each other"),
    ],
)
def test_what_launch_refuses_is_refused_at_once(parameters: dict[str, Any], said: str, client: Client) -> None:
    answer = client.ask(CREATE, c=ours(parameters), p="p")
    assert said in answer["errors"][0]["message"] and "\n" not in answer["errors"][0]["message"]
    assert client.server.sweeps == {}


@pytest.mark.parametrize(
    ("argument", "said"), [("orpo.betta=1", "Did you mean 'orpo.beta'"), ("adapter=bia", "there is no adapter 'bia'")]
)
def test_so_are_the_commands_own_arguments(argument: str, said: str, client: Client) -> None:
    config = ours({"orpo.beta": {"value": 1}}, command=[*COMMAND, argument])
    assert said in client.ask(CREATE, c=config, p="p")["errors"][0]["message"]


def test_what_only_the_agents_machine_knows_is_left_to_it(client: Client) -> None:
    command = [*COMMAND, "data=jsonl", "data.path=pairs.jsonl", "${envvar:MORE}", "sweep=none", "sweep.file=mine.yaml"]
    sweep = client.get(CREATE, c=ours({"data.path": {"values": ["a.jsonl", "b.jsonl"]}}, command=command), p="p")
    found = client.server.sweeps[sweep["upsertSweep"]["sweep"]["name"]]
    assert found.definition is not None and found.definition.parameters["data.path"].choices == ("a.jsonl", "b.jsonl")


def test_other_programs_have_wandbs_rules(client: Client) -> None:
    config = ours({"beta": {"value": -1}}, command=["${program}", "${args}"], program="train.py")
    assert "errors" not in client.ask(CREATE, c=config, p="p")


def test_a_sweep_ends_when_a_run_has_reached_the_target(client: Client) -> None:
    config = ours({"lr": {"min": 0.0, "max": 1.0}}, command=["train.py"], program="train.py",
                  metric={"name": "loss", "goal": "minimize", "target": 0.5}, run_cap=9)  # fmt: skip
    sweep = client.get(CREATE, c=config, p="p")["upsertSweep"]["sweep"]
    agent = client.agent(sweep)
    for loss, next_one in ((0.7, "run"), (0.5, "exit")):
        name = client.beat(agent)[0]["run_id"]
        client.begin(name, sweep)
        client.beat(agent, name)
        client.stream(name, [{"_step": 0, "loss": loss}], summary={"loss": loss}, complete=True, exitcode=0)
        command = client.beat(agent)
        assert command[0]["type"] == next_one
        if next_one == "run":
            client.begin(command[0]["run_id"], sweep)
            client.stream(command[0]["run_id"], [], summary={"loss": 0.6}, complete=True, exitcode=0)
    assert client.server.sweeps[sweep["name"]].state == "FINISHED"


@pytest.mark.parametrize(("state", "told"), [("diverged", True), ("failed", False)])
def test_only_a_diverged_trial_counts_as_a_bad_point(state: str, told: bool, client: Client) -> None:
    sweep = client.sweep(method="bayes")
    agent = client.agent(sweep)
    name = client.beat(agent)[0]["run_id"]
    client.begin(name, sweep)
    client.beat(agent, name)
    client.stream(name, [{"_step": 0}], summary={"state": state}, complete=True, exitcode=1)
    client.beat(agent)
    served = client.server.sweeps[sweep["name"]]
    assert served.sampler._model is not None and served.sampler._model.outcomes == int(told)
    client.server.close()
    client.server = Server(client.folder, "local")
    again = client.server.sweeps[sweep["name"]]
    assert again.sampler._model is not None and again.sampler._model.outcomes == int(told), "also after a restart"


def test_a_sweep_that_is_not_valid_any_more_does_not_keep_the_server_from_starting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(tmp_path, "local")
    good = server.create_sweep(None, "p", ours({"orpo.beta": {"value": 1.0}}), {})
    old = server.create_sweep(None, "p", ours({"orpo.beta": {"value": 2.0}}), {})
    server.close()
    log = tmp_path / "server.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    for event in events:
        if event.get("id") == old.id:
            event["config"] = event["config"].replace("2.0", "-2.0")
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    server = Server(tmp_path, "local")
    assert f"sweep {old.id} is only shown" in caplog.text
    assert server.sweeps[old.id].definition is None and server.sweeps[old.id].state == "FINISHED"
    assert server.sweeps[good.id].definition is not None
    assert SweepFolder(tmp_path / "sweeps" / old.id).journal.is_file(), "nothing of it is lost"
    server.close()
