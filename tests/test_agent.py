"""Launch under a W&B agent: exactly the trial that the agent asks for, in a folder that many agents share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, launch_command, processes_of
from helpers.serving import Serving
from helpers.waiting import wait_for
from hydra import compose, initialize_config_dir

from isaerft_sweep.config.boundary import to_definition, to_experiment
from isaerft_sweep.config.schema import sweep_files
from isaerft_sweep.controller import agent
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.paths import folder
from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.search.distributions import contains
from isaerft_sweep.serve.server import Server
from isaerft_sweep.spec_fields import overrides
from isaerft_sweep.specs import Experiment

AGENT = {"WANDB_SWEEP_ID": "sweep123", "WANDB_PROJECT": "p", "WANDB_ENTITY": "e"}
OPTIONS = (*TINY, "sweep=none", "tracker=disabled")


@pytest.mark.parametrize("file", sweep_files(), ids=lambda file: file.stem)
def test_every_sweep_file_can_be_run_by_agents(file: Path, tmp_path: Path) -> None:
    """The server takes the file, and what it tells an agent composes to the point that it means."""
    raw = yaml.safe_load(file.read_text())
    server = Server(tmp_path / "data", "local")
    try:
        sweep = server.create_sweep(None, "p", file.read_text(), {})
        command = server.registry.heartbeat(server.registry.create_agent(sweep, "host", "me").id, {})[0]
    finally:
        server.close()
    given = {key: block["value"] for key, block in command["args"].items()}
    place = raw["command"].index("isaerft_sweep.launch")
    assert raw["command"][:place] == ["${env}", "${interpreter}", "-m"] and raw["command"][-1] == "${args_no_hyphens}"
    told = [*raw["command"][place + 1 : -1], *overrides(given)]
    with initialize_config_dir(str(folder("conf")), version_base="1.3"):
        experiment = to_experiment(compose("config", told))
    definition = to_definition(experiment.sweep, experiment)
    assert (definition.metric.name, definition.metric.goal) == (raw["metric"]["name"], raw["metric"]["goal"])
    point = agent.point_from_agent(experiment, definition, {})
    assert dict(point.params) == given and contains(definition.parameters, point.params)


def test_a_point_of_another_space_is_noticed(experiment: Callable[..., Experiment]) -> None:
    composed = experiment("sweep=quick", "orpo.beta=0.7")
    definition = to_definition(composed.sweep, composed)
    assert not contains(definition.parameters, agent.point_from_agent(composed, definition, {}).params)
    assert not contains(definition.parameters, {"orpo.beta": 0.5})


def test_the_agent_s_own_file_names_what_is_swept(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("wandb_version: 1\nadapter.kind: {value: scale}\n")
    composed = experiment("sweep=quick", "adapter.kind=scale")
    point = agent.point_from_agent(composed, to_definition(composed.sweep, composed), {"WANDB_SWEEP_PARAM_PATH": str(file)})
    assert point.params == {"adapter.kind": "scale"}


def test_runs_go_to_the_agent_s_project_online_unless_told_otherwise(experiment: Callable[..., Experiment]) -> None:
    def tracker(*overrides: str, **environment: str) -> tuple[str, str, str | None]:
        made = agent.with_agent_settings(experiment(*overrides), overrides, {**AGENT, **environment}, first=True).tracker
        return made.mode, made.project, made.entity

    assert tracker() == ("wandb", "p", "e")
    assert tracker("tracker=offline")[0] == "offline" and tracker("tracker.mode=disabled")[0] == "disabled"
    assert tracker(WANDB_MODE="offline")[0] == "offline" and tracker(WANDB_MODE="online")[0] == "wandb"


def test_the_untrained_model_is_evaluated_in_one_run_of_the_sweep(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    whole, answers = SweepFolder(tmp_path / "sweep123"), {}
    barrier = threading.Barrier(8)

    def ask(run: str) -> None:
        barrier.wait()
        answers[run] = agent.is_first_run(whole, run)

    threads = [threading.Thread(target=ask, args=(f"run{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(answers.values()) == 1
    winner = next(run for run, first in answers.items() if first)
    assert agent.is_first_run(whole, winner), "also when it is started again"
    wanted = {True: "always", False: "never"}
    for first, word in wanted.items():
        assert agent.with_agent_settings(experiment(), (), AGENT, first).orpo.eval_untrained == word
    assert (
        agent.with_agent_settings(experiment("orpo.eval_untrained=always"), (), AGENT, False).orpo.eval_untrained == "always"
    )


@pytest.mark.parametrize("run", ["", "../x", "a b", "x" * 65])
def test_an_id_that_cannot_name_a_folder(run: str) -> None:
    with pytest.raises(LaunchError, match="WANDB_RUN_ID must be an id"):
        agent.id_from_agent({"WANDB_RUN_ID": run}, "WANDB_RUN_ID")


def under_agent(run: str) -> dict[str, str]:
    return {**os.environ, **AGENT, "WANDB_RUN_ID": run}


def statuses(where: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in where.glob(f"outputs/sweep123/{run}/trials/*/status.json")]


@pytest.mark.parametrize(
    ("state", "given_up", "code"),
    [
        ("completed", False, 0),
        ("pruned", False, 0),
        ("diverged", False, 1),
        ("failed", True, 1),
        ("failed", False, 130),
        ("stopped", False, 130),
    ],
)
def test_the_exit_code_tells_how_the_trial_ended(state: str, given_up: bool, code: int, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    assert agent.exit_code(folder) == 130, "it never began"
    journal = Journal(folder)
    journal.write("trial", index=0, name="a", run_id="a", params={}, unit={})
    journal.write("dispatch", index=0, attempt=1, job={"kind": "local", "pid": 1})
    journal.write("end", index=0, state=state, metric=None, message="", seconds=1.0, given_up=given_up)
    journal.close()
    assert agent.exit_code(folder) == code


def test_a_run_that_another_process_still_runs_is_followed(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its agent has died while the job waited, and the server has handed it out again."""
    composed = experiment(*OPTIONS, f"output={tmp_path}")
    other = Journal(SweepFolder(tmp_path / "sweep123" / "run1"))
    followed: list[Path] = []

    def follow(_console: Any, path: Path) -> bool:
        followed.append(path)
        other.close()
        return True

    begun: list[SweepFolder] = []
    monkeypatch.setattr(agent, "follow", follow)
    monkeypatch.setattr(agent, "run_trials", lambda run, **_: begun.append(run.folder))
    assert agent.run_for_agent(composed, (), {**AGENT, "WANDB_RUN_ID": "run1"}) == 130
    assert followed == [tmp_path / "sweep123" / "run1"] and [f.path for f in begun] == followed


@pytest.mark.slow
@pytest.mark.long
def test_one_trial_each_in_a_shared_folder_and_true_exit_codes(tmp_path: Path) -> None:
    points = {"run1": "0.1", "run2": "0.2"}
    started = {
        run: subprocess.Popen(
            launch_command(*OPTIONS, f"orpo.learning_rate={lr}"),
            cwd=tmp_path,
            env=under_agent(run),
            stdout=subprocess.DEVNULL,
        )
        for run, lr in points.items()
    }
    assert [process.wait(300) for process in started.values()] == [0, 0]
    sweep = read_sweep_folder(tmp_path / "outputs" / "sweep123")
    assert {entry.record.run_id: entry.params["orpo.learning_rate"] for entry in sweep.entries} == {"run1": 0.1, "run2": 0.2}
    assert sorted(entry.record.index for entry in sweep.entries) == [0, 1] and sweep.best().rank == 1
    specs = [entry.folder.read_spec() for entry in sweep.entries if entry.folder]
    assert (
        all((spec.sweep_id, spec.sweep_name) == ("sweep123", "sweep123") for spec in specs)
        and len({s.name for s in specs}) == 2
    )
    cards = [(entry.folder.adapter / "README.md").read_text() for entry in sweep.entries if entry.folder]
    assert any("of 2 completed trials" in card for card in cards)
    assert sum(bool(entry.untrained) for entry in sweep.entries) == 1
    again = subprocess.run(
        launch_command(*OPTIONS, "orpo.learning_rate=0.1"),
        cwd=tmp_path,
        env=under_agent("run1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0 and "1 already ended" in again.stdout, again.stderr
    other = subprocess.run(
        launch_command(*OPTIONS, "orpo.learning_rate=0.3"),
        cwd=tmp_path,
        env=under_agent("run1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert other.returncode == 2 and "holds another sweep" in other.stderr, "the same id for another point is refused"
    failing = subprocess.run(
        launch_command(*OPTIONS, "orpo.learning_rate=1e6", "model.dtype=float16", "orpo.warmup_steps=0"),
        cwd=tmp_path,
        env=under_agent("run3"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert failing.returncode == 1, "it diverged"


@pytest.mark.slow
@pytest.mark.usefixtures("paced")
@pytest.mark.long
def test_a_signal_checkpoints_and_the_same_run_goes_on(tmp_path: Path) -> None:
    """SIGTERM; Ctrl-C comes from a real agent in ``test_agent_signals``."""
    number = signal.SIGTERM
    command = launch_command(*OPTIONS, "orpo.max_steps=100000")
    launch = subprocess.Popen(command, cwd=tmp_path, env=under_agent("run1"), stdout=subprocess.DEVNULL, process_group=0)
    reached = wait_for(lambda: next((s["step"] for s in statuses(tmp_path, "run1") if s.get("step", 0) > 3), None))
    launch.send_signal(number)
    assert launch.wait(120) == 130 and processes_of(tmp_path) == []
    assert list(tmp_path.glob("outputs/sweep123/run1/trials/*/checkpoints/checkpoint-*/.complete"))
    launch = subprocess.Popen(command, cwd=tmp_path, env=under_agent("run1"), stdout=subprocess.DEVNULL, process_group=0)
    wait_for(lambda: [s for s in statuses(tmp_path, "run1") if s["attempt"] == 2 and s.get("step", 0) > reached])
    launch.send_signal(number)
    assert launch.wait(120) == 130 and processes_of(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("macro", "nested"),
    [(None, False), ("${args_no_boolean_flags}", False), ("${args_json_file}", False), ("${args}", True)],
)
@pytest.mark.long
def test_a_real_agents_values_are_what_is_trained(macro: str | None, nested: bool, serving: Serving, tmp_path: Path) -> None:
    """Whatever the command has in the macro's place: nothing at all left the trial with the config's own values."""
    sites = [[{"layer": 1, "sae_release": "isaerft-sweep", "sae_id": "random-64x256"}]]
    flat = {
        "orpo.beta": {"values": [0.1]},
        "adapter.sites": {"values": sites},
        "orpo.gradient_checkpointing": {"values": [False]},
    }
    blocks = {"orpo": {"parameters": {"beta": flat["orpo.beta"]}}} if nested else flat
    command = [
        "${env}",
        "${interpreter}",
        "-m",
        "isaerft_sweep.launch",
        *OPTIONS,
        "orpo.beta=1.0",
        *([macro] if macro else []),
    ]
    raw = {
        "program": "isaerft_sweep/launch.py",
        "method": "grid",
        "metric": {"name": "eval/log_odds_chosen", "goal": "maximize"},
        "parameters": blocks,
        "command": command,
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(raw))
    agent_process = serving.agent(serving.sweep(tmp_path / "s.yaml"), "agent", "--count", "1")
    agent_process.wait(300)
    specs = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/*/*/trials/*/spec.json")]
    assert len(specs) == 1, (tmp_path / "agent.out").read_text()
    assert specs[0]["experiment"]["orpo"]["beta"] == 0.1 == specs[0]["params"]["orpo.beta"]
    if not nested:
        assert specs[0]["experiment"]["adapter"]["sites"][0]["layer"] == 1
    states = [json.loads(path.read_text())["state"] for path in tmp_path.glob("outputs/*/*/trials/*/status.json")]
    assert states == ["completed"]
