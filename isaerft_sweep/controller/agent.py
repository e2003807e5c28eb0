"""One trial for a W&B agent: a sweep of one given point, with the ids and values that the agent has chosen.

Every run has a folder of its own, ``outputs/<sweep id>/<run id>``, with a journal that this process alone writes: agents on
many machines share the sweep's folder and never wait for each other. The same run started again goes on in its folder.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.config.compose import agent_values
from isaerft_sweep.controller.controller_info import controller_alive, last_controller_info
from isaerft_sweep.controller.monitor import follow
from isaerft_sweep.controller.run_controller import INTERRUPTED
from isaerft_sweep.controller.run_sweep import SweepRun, run_trials
from isaerft_sweep.controller.sweep_identity import write_definition
from isaerft_sweep.controller.trial_factory import AgentRun
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.journal.journal import SweepRecord, TrialRecord, replay
from isaerft_sweep.journal.layout import SweepFolder, TrialFolder
from isaerft_sweep.journal.states import FINAL, TrialState
from isaerft_sweep.search.distributions import Distribution
from isaerft_sweep.search.sampler import FixedPoints, Point
from isaerft_sweep.search.sweep_file import SweepDefinition
from isaerft_sweep.spec_fields import to_dict
from isaerft_sweep.specs import Experiment, swept_value
from isaerft_sweep.terminal import make_console
from isaerft_sweep.tracking.late_report import report_late

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def run_for_agent(experiment: Experiment, overrides: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run or go on with the agent's trial; 0 when it completed or was stopped early, 130 when it will go on, else 1.

    ``environment``: what the agent has set. Raises IsaerftError before the trial is dispatched when something is wrong that
    the user can mend.
    """
    agent = os.getppid()
    sweep_id, run_id = (given_id(environment, name) for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"))
    output = Path(experiment.output).expanduser().absolute()
    whole = SweepFolder(output / sweep_id)
    folder = SweepFolder(whole.path / run_id, names_root=output)
    if controller_alive(folder):  # its agent is gone and the run was handed out again: the trial itself goes on
        print(f"run {run_id} is already run by {last_controller_info(folder)}: following it", flush=True)
        follow(make_console(), folder.path)
    definition = to_definition(experiment.sweep, experiment)
    point = given_point(experiment, definition, environment)
    if not contains(definition.parameters, point.params):
        print(
            f"note: the agent's point {dict(point.params)} is not one of {experiment.sweep.file}: the space is not known. "
            "Give the sweep's own file in its command: sweep=none, sweep.file=PATH.",
            file=sys.stderr,
        )
        definition = dataclasses.replace(definition, parameters={}, raw={})
    experiment = adapted(experiment, overrides, environment, first=first_of(whole, run_id))
    definition = dataclasses.replace(definition, method="the agent's", run_cap=1, early_terminate=None)
    if not whole.definition.exists():
        write_definition(experiment, definition, whole)
    ended = ended_trial(folder)
    checked = whole.path / ".checked"
    given = AgentRun(sweep_id, run_id, whole, agent)
    run = SweepRun(experiment, definition, FixedPoints([point]), folder, overrides, agent_run=given)
    run_trials(run, show=False, check=not checked.exists())
    checked.touch()
    if untold := untold_trial(folder):
        report_late(untold)
    if ended is not None:  # the agent asks for it, so its server does not know
        print("it had ended already: telling W&B again", flush=True)
        report_late(ended)
    return exit_code(folder)


def untold_trial(folder: SweepFolder) -> TrialFolder | None:
    """The folder's trial, when it has been stopped and could not say so to W&B."""
    stopped = [folder.trial(trial.name) for trial in journaled(folder) if trial.state == TrialState.STOPPED]
    return next((trial for trial in stopped if trial.read_status().wandb_not_notified), None)


def ended_trial(folder: SweepFolder) -> TrialFolder | None:
    """The folder's trial, when it has come to its own end before."""
    return next((folder.trial(trial.name) for trial in journaled(folder) if trial.state in FINAL), None)


def journaled(folder: SweepFolder) -> list[TrialRecord]:
    """What the folder's journal says of its trials; none when there is no journal yet."""
    record = SweepRecord()
    replay(folder.journal, record)
    return list(record.trials.values())


def given_id(environment: Mapping[str, str], name: str) -> str:
    """An id that the agent has set. Raises LaunchError when it is missing or cannot name a folder."""
    found = environment.get(name, "")
    if not ID.fullmatch(found):
        raise LaunchError(
            f"WANDB_SWEEP_ID is set, so a W&B agent seems to have started this; then {name} must be an id of letters, "
            f"digits, '-' and '_' but got '{found}'. Without an agent: unset WANDB_SWEEP_ID."
        )
    return found


def given_point(experiment: Experiment, definition: SweepDefinition, environment: Mapping[str, str]) -> Point:
    """The swept values as the composed config has them: the keys of the agent's own file, else the sweep file's.

    Raises LaunchError when the config has another value than the agent's file.
    """
    values = agent_values(environment)
    point = {key: to_dict(swept_value(experiment, key)) for key in (definition.parameters if values is None else values)}
    for key, value in (values or {}).items():
        meant = to_dict(swept_value(experiment.with_params({key: value}).with_absolute_paths(), key))
        if point[key] != meant:
            raise LaunchError(
                f"{key} must be what the agent gave, {meant!r}, but the config has {point[key]!r}. Leave {key} out of the "
                "sweep file's command."
            )
    return Point(point)


def contains(space: Mapping[str, Distribution], params: Mapping[str, Any]) -> bool:
    """Whether the point may come from the space."""
    if set(space) != set(params):
        return False
    for key, distribution in space.items():
        value = params[key]
        if distribution.choices is not None:
            if not any(_same(choice, value) for choice in distribution.choices):
                return False
        elif not min(distribution.at(0.0), distribution.at(1.0)) <= value <= max(distribution.at(0.0), distribution.at(1.0)):
            return False
    return True


def _same(given: Any, configured: Any) -> bool:
    """Whether a sweep file's value is a config's, which also has the options that the file left out."""
    if isinstance(given, Mapping) and isinstance(configured, Mapping):
        return all(_same(given.get(key), configured.get(key)) for key in given.keys() | configured.keys())
    if isinstance(given, (list, tuple)) and isinstance(configured, (list, tuple)):
        return len(given) == len(configured) and all(map(_same, given, configured))
    return bool(given == configured)


def first_of(whole: SweepFolder, run_id: str) -> bool:
    """Whether this run is the sweep's first one: one alone gets that answer, whoever else asks at the same time."""
    marker = whole.path / ".first"
    whole.path.mkdir(parents=True, exist_ok=True)
    aside = whole.path / f".first-{run_id}"
    aside.write_text(run_id, encoding="utf-8")
    try:
        os.link(aside, marker)
    except FileExistsError:
        pass
    finally:
        aside.unlink(missing_ok=True)
    return marker.read_text(encoding="utf-8") == run_id


def adapted(experiment: Experiment, overrides: Sequence[str], environment: Mapping[str, str], first: bool) -> Experiment:
    """What the agent decides: the run goes to its project, online unless somebody has said otherwise."""
    tracker = experiment.tracker
    project, entity = environment.get("WANDB_PROJECT") or tracker.project, environment.get("WANDB_ENTITY") or tracker.entity
    mode = tracker.mode
    if not any(override.lstrip("+").startswith(("tracker=", "tracker.mode=")) for override in overrides):
        mode = {"offline": "offline", "disabled": "disabled"}.get(environment.get("WANDB_MODE", ""), "wandb")
    untrained = experiment.orpo.eval_untrained
    if untrained == "first":  # every run is the first of its own folder
        untrained = "always" if first else "never"
    return dataclasses.replace(
        experiment,
        tracker=dataclasses.replace(tracker, mode=mode, project=project, entity=entity),
        orpo=dataclasses.replace(experiment.orpo, eval_untrained=untrained),
    )


def exit_code(folder: SweepFolder) -> int:
    """The trial's true outcome: what an agent, a scheduler and a person take it for."""
    trials = journaled(folder)
    if not trials or not all(trial.ended for trial in trials):  # one that was stopped, or failed and would be tried again
        return INTERRUPTED
    return 0 if {trial.state for trial in trials} <= {TrialState.COMPLETED, TrialState.PRUNED} else 1
