"""Retries a single trial that failed or was stopped."""

from __future__ import annotations

from pathlib import Path

from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.controller.build import make_dispatcher, make_state
from isaerft_sweep.controller.controller_info import controller_alive, last_controller_info
from isaerft_sweep.controller.logs import find_record
from isaerft_sweep.controller.run_controller import INTERRUPTED, disk_errors_named, run_controller
from isaerft_sweep.controller.session import read_experiment
from isaerft_sweep.controller.trial_factory import TrialFactory
from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.journal import Journal, TrialRecord
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.paths import quoted
from isaerft_sweep.results import leaderboard
from isaerft_sweep.results.card.model_card import refresh_cards
from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.search.sampler import FixedPoints
from isaerft_sweep.specs import Experiment
from isaerft_sweep.terminal import make_console


def retry(path: Path, trial: str) -> int:
    """Retry the trial by the controller that runs the sweep, else in this process; an exit code as ``run_sweep``'s.

    Raises FolderError when the trial cannot be retried.
    """
    if SweepFolder(path.expanduser().absolute()).agent_run_folders():
        raise FolderError(f"the trials in {path} are run by W&B agents: start an agent, and it gets them again.")
    monitor, record = find_record(path, trial)
    folder = monitor.folder
    _check(record, folder)
    if controller_alive(folder):
        folder.ask_to_retry(record.index)
        print(f"Asked {last_controller_info(folder)} to run trial {record.index + 1}, {record.name}, again.")
        return 0
    return _run(read_experiment(folder), folder, record)


def _check(record: TrialRecord, folder: SweepFolder) -> None:
    """Raise FolderError unless a retry may change the outcome."""
    label = f"trial {record.index + 1}, {record.name},"
    log = f"isaerft-sweep logs {quoted(folder.path)} {record.index + 1}"
    if record.state in (TrialState.COMPLETED, TrialState.PRUNED):
        raise FolderError(f"{label} has {record.state}: there is nothing to try again. With another seed: confirm.")
    if record.state == TrialState.DIVERGED:
        raise FolderError(f"{label} has diverged, and would again: the same point gives the same numbers. See {log}")
    if record.state is TrialState.QUEUED and controller_alive(folder):
        raise FolderError(f"{label} is under way. Follow it: {log} -f")
    if not folder.trial(record.name).spec.is_file():
        raise FolderError(f"{label} has no spec.json in {folder.trial(record.name).path} any more: restore its folder.")
    if not record.given_up and controller_alive(folder):
        raise FolderError(f"{label} is {record.state} and waits for its turn: the controller will run it.")


def _run(experiment: Experiment, folder: SweepFolder, record: TrialRecord) -> int:
    definition = to_definition(experiment.sweep, experiment)
    controller, console, journal = last_controller_info(folder), make_console(), Journal(folder)
    try:
        trials = max(controller.trials if controller else 0, len(journal.record.trials))
        overrides = controller.overrides if controller else ()
        factory = TrialFactory(experiment, definition, folder, journal.record.sweep_id, None, overrides)
        state = make_state(journal, FixedPoints([]), factory, 0)
        state.restore()
        state.retry_only(record.index)
        with disk_errors_named(folder):
            urgency = run_controller(factory, state, make_dispatcher(experiment.launcher, folder), trials)
        state_after = journal.record.trials[record.index].state
    finally:
        journal.close()
    sweep = read_sweep_folder(folder.path)
    leaderboard.write_csv(sweep, folder.leaderboard)
    refresh_cards(sweep)
    leaderboard.show(console, sweep)
    console.print(f"trial {record.index + 1}, {record.name}: {state_after}")
    return INTERRUPTED if urgency else int(state_after is not TrialState.COMPLETED)
