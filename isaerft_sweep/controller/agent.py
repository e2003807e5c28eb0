"""Runs one trial for a W&B agent: a sweep of one point, with the agent's ids and values.

Every run has its own folder, ``outputs/<sweep id>/<run id>``, and its own journal: agents on many machines share the sweep's
folder and never wait for each other. The same run started again resumes in its folder.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.config.compose import agent_values
from isaerft_sweep.controller.controller_info import controller_alive, last_controller_info
from isaerft_sweep.controller.monitor import follow
from isaerft_sweep.controller.run_controller import INTERRUPTED
from isaerft_sweep.controller.run_sweep import SweepRun, run_trials
from isaerft_sweep.controller.sweep_identity import write_definition
from isaerft_sweep.controller.trial_factory import AgentRun
from isaerft_sweep.errors import ConfigError, LaunchError
from isaerft_sweep.journal.journal import TrialRecord, read_record
from isaerft_sweep.journal.layout import SweepFolder, TrialFolder
from isaerft_sweep.journal.states import FINAL, TrialState
from isaerft_sweep.search.distributions import contains
from isaerft_sweep.search.sampler import FixedPoints, Point
from isaerft_sweep.search.sweep_file import SweepDefinition
from isaerft_sweep.specs import Experiment, SweepSpec, swept_value
from isaerft_sweep.terminal import make_console
from isaerft_sweep.tracking.late_report import report_late

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def run_for_agent(experiment: Experiment, overrides: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run or resume the agent's trial; 0 when it completed or was pruned, 130 when it can resume, else 1.

    ``environment``: the process's, with the agent's variables. Raises IsaerftError before the trial is dispatched when
    something is wrong that the user can fix.
    """
    _check_sweep_options(experiment.sweep)
    agent = os.getppid()
    sweep_id, run_id = (id_from_agent(environment, name) for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"))
    output = Path(experiment.output).expanduser().absolute()
    parent = SweepFolder(output / sweep_id)
    folder = SweepFolder(parent.path / run_id, names_root=output)
    if controller_alive(folder):  # its first agent died and another agent got the run; the trial itself still runs
        print(f"run {run_id} is already run by {last_controller_info(folder)}: following it", flush=True)
        follow(make_console(), folder.path)
    definition = to_definition(experiment.sweep, experiment)
    point = point_from_agent(experiment, definition, environment)
    if not contains(definition.parameters, point.params):
        print(
            f"note: the agent's point {dict(point.params)} is not in the search space of {experiment.sweep.file}. Give "
            "the sweep's own file in its command: sweep=none, sweep.file=PATH.",
            file=sys.stderr,
        )
        definition = dataclasses.replace(definition, parameters={}, raw={})
    experiment = with_agent_settings(experiment, overrides, environment, first=is_first_run(parent, run_id))
    definition = dataclasses.replace(definition, method="the agent's", run_cap=1, early_terminate=None)
    if not parent.definition.exists():
        write_definition(experiment, definition, parent)
    already_ended = ended_trial(folder)
    checked = parent.checked
    agent_run = AgentRun(sweep_id, run_id, parent, agent)
    run = SweepRun(experiment, definition, FixedPoints([point]), folder, overrides, agent_run=agent_run)
    run_trials(run, show=False, check=not checked.exists())
    checked.touch()
    if unreported := unreported_trial(folder):
        report_late(unreported)
    if already_ended is not None:  # the agent got the run again, so its server does not know that it has ended
        print("it had ended already: reporting it to W&B again", flush=True)
        report_late(already_ended)
    return exit_code(folder)


def _check_sweep_options(sweep: SweepSpec) -> None:
    """Raise ConfigError for an option that decides over points: under an agent its server does."""
    default = SweepSpec()
    names = ("seeds", "start", "prior", "shuffle", "emulate", "stop")
    given = [name for name in names if getattr(sweep, name) != getattr(default, name)]
    if given:
        raise ConfigError(
            f"sweep.{given[0]} decides which points run, but under `wandb agent` the server of the sweep does. Leave it out "
            "of the sweep file's command, or run the sweep without agents: python -m isaerft_sweep.launch."
        )


def unreported_trial(folder: SweepFolder) -> TrialFolder | None:
    """The folder's trial, when it was stopped and could not report that to W&B."""
    stopped = [folder.trial(trial.name) for trial in trial_records(folder) if trial.state == TrialState.STOPPED]
    return next((trial for trial in stopped if trial.read_status().wandb_not_notified), None)


def ended_trial(folder: SweepFolder) -> TrialFolder | None:
    """The folder's trial, when it has completed or diverged before."""
    return next((folder.trial(trial.name) for trial in trial_records(folder) if trial.state in FINAL), None)


def trial_records(folder: SweepFolder) -> list[TrialRecord]:
    """The trials in the folder's journal; none before it exists."""
    return list(read_record(folder).trials.values())


def id_from_agent(environment: Mapping[str, str], variable: str) -> str:
    """An id that the agent has set. Raises LaunchError when it is missing or cannot name a folder."""
    value = environment.get(variable, "")
    if not ID.fullmatch(value):
        raise LaunchError(
            f"WANDB_SWEEP_ID is set, so a W&B agent seems to have started this; then {variable} must be an id of "
            f"letters, digits, '-' and '_' but got '{value}'. Without an agent: unset WANDB_SWEEP_ID."
        )
    return value


def point_from_agent(experiment: Experiment, definition: SweepDefinition, environment: Mapping[str, str]) -> Point:
    """The composed config's values at the swept keys: those of the agent's file, else those of the sweep file.

    Raises LaunchError when the config and the agent's file differ.
    """
    values = agent_values(environment)
    point = {key: swept_value(experiment, key) for key in (definition.parameters if values is None else values)}
    for key, value in (values or {}).items():
        expected = swept_value(experiment.with_params({key: value}).with_absolute_paths(), key)
        if point[key] != expected:
            raise LaunchError(
                f"{key} must be what the agent gave, {expected!r}, but the config has {point[key]!r}. Leave {key} out of "
                "the sweep file's command."
            )
    return Point(point)


def is_first_run(parent: SweepFolder, run_id: str) -> bool:
    """Whether this run is the sweep's first: true for exactly one, also when several start at the same time."""
    marker, aside = parent.first_run, parent.claim_of_first_run(run_id)
    parent.path.mkdir(parents=True, exist_ok=True)
    aside.write_text(run_id, encoding="utf-8")
    try:
        os.link(aside, marker)
    except FileExistsError:
        pass
    finally:
        aside.unlink(missing_ok=True)
    return marker.read_text(encoding="utf-8") == run_id


def with_agent_settings(
    experiment: Experiment, overrides: Sequence[str], environment: Mapping[str, str], first: bool
) -> Experiment:
    """``experiment`` with the agent's settings.

    Args:
        experiment: the composed config.
        overrides: the command line's; without one of the tracker the run is online.
        environment: with the agent's project, entity and mode.
        first: whether this is the sweep's first run, which evaluates the untrained model.
    """
    tracker = experiment.tracker
    project, entity = environment.get("WANDB_PROJECT") or tracker.project, environment.get("WANDB_ENTITY") or tracker.entity
    mode = tracker.mode
    if not any(override.lstrip("+").startswith(("tracker=", "tracker.mode=")) for override in overrides):
        mode = {"offline": "offline", "disabled": "disabled"}.get(environment.get("WANDB_MODE", ""), "wandb")
    untrained = experiment.orpo.eval_untrained
    if untrained == "first":  # every run is the first trial of its own folder
        untrained = "always" if first else "never"
    return dataclasses.replace(
        experiment,
        tracker=dataclasses.replace(tracker, mode=mode, project=project, entity=entity),
        orpo=dataclasses.replace(experiment.orpo, eval_untrained=untrained),
    )


def exit_code(folder: SweepFolder) -> int:
    """The trial's outcome as an exit code, for the agent, a scheduler and the user."""
    trials = trial_records(folder)
    if not trials or not all(trial.ended for trial in trials):  # stopped, or failed with retries left
        return INTERRUPTED
    return 0 if {trial.state for trial in trials} <= {TrialState.COMPLETED, TrialState.PRUNED} else 1
