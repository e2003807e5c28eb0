"""Runs the sweep of an experiment, from preflight to leaderboard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from isaerft_sweep.config.boundary import to_definition, variants, with_sweeps_project
from isaerft_sweep.controller.build import (
    check_launcher,
    count_trials,
    make_dispatcher,
    make_early_stopping,
    make_sampler,
    make_state,
)
from isaerft_sweep.controller.introduction import introduction, print_preflight
from isaerft_sweep.controller.preflight import check_disk, known_trial_needs
from isaerft_sweep.controller.prior import prior_results, summary
from isaerft_sweep.controller.run_controller import INTERRUPTED, disk_errors_named, run_controller
from isaerft_sweep.controller.stop_rule import make_stop_rule
from isaerft_sweep.controller.sweep_identity import (
    begin_sweep,
    check_files,
    known_fingerprints,
    open_journal,
    result_files,
    settings,
    sweep_folder,
)
from isaerft_sweep.controller.trial_activity import given_up_note
from isaerft_sweep.controller.trial_factory import AgentRun, TrialFactory, new_sweep_id
from isaerft_sweep.journal.atomic_files import write_text
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.provenance import git_commit
from isaerft_sweep.results import leaderboard
from isaerft_sweep.results.card.model_card import refresh_cards
from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.search.sampler import PointSource
from isaerft_sweep.search.sweep_file import SweepDefinition
from isaerft_sweep.specs import Experiment
from isaerft_sweep.terminal import make_console
from isaerft_sweep.tracking.announce import create_sweep, finish_sweep


@dataclass(frozen=True)
class SweepRun:
    """A sweep to run, or to resume in its folder.

    Args:
        experiment: the composed config, which all trials share.
        definition: the metric, and the content of ``sweep.yaml``.
        sampler: gives the points.
        folder: the sweep's; its unfinished trials resume.
        overrides: the command line's, for the command that reproduces a trial.
        fingerprint: distinguishes this sweep from another in the same folder; None: computed from experiment and definition.
        agent_run: the single run that a W&B agent has started.
    """

    experiment: Experiment
    definition: SweepDefinition
    sampler: PointSource
    folder: SweepFolder
    overrides: Sequence[str] = ()
    fingerprint: str | None = None
    agent_run: AgentRun | None = None

    @property
    def known_fingerprints(self) -> list[str]:
        """The fingerprint, then those of earlier versions for the same sweep."""
        return [self.fingerprint] if self.fingerprint else known_fingerprints(self.experiment, self.definition)

    @property
    def parent_folder(self) -> SweepFolder:
        """The folder of the whole sweep, in which an agent's run has its own folder."""
        return self.agent_run.parent_sweep if self.agent_run else self.folder


def run_sweep(experiment: Experiment, overrides: Sequence[str] = ()) -> int:
    """Run or resume the sweep; the exit code: 0, 1 when no trial completed or one was given up, 130 when stopped.

    Raises IsaerftError before any trial is dispatched when something is wrong that the user can fix.
    """
    definition = to_definition(experiment.sweep, experiment)
    folder = sweep_folder(experiment, definition)
    earlier = prior_results(folder, experiment, definition) if experiment.sweep.prior else []
    sampler = make_sampler(experiment, definition, earlier, folder)
    definition = replace(definition, notes=(*definition.notes, *summary(earlier, experiment.sweep.prior)))
    return run_trials(SweepRun(experiment, definition, sampler, folder, overrides))


def run_trials(run: SweepRun, show: bool = True, check: bool = True) -> int:
    """Run the sampler's points; the exit code as ``run_sweep``'s.

    ``show``: whether to print the leaderboard at the end. ``check``: whether to check model, SAE and data first.
    """
    with disk_errors_named(run.folder):
        check_disk(run.folder.path, run.experiment.launcher.min_free_gb)
        fingerprints = run.known_fingerprints
        run = replace(run, experiment=with_sweeps_project(run.experiment, run.definition))
        files = result_files(run.experiment, run.definition)
        journal = open_journal(run.folder, fingerprints, settings(run.experiment, run.definition), files)
        try:
            return _run_opened(run, journal, fingerprints[0], show, check)
        finally:
            journal.close()


def _run_opened(run: SweepRun, journal: Journal, fingerprint: str, show: bool, check: bool) -> int:
    experiment, definition, folder, console = run.experiment, run.definition, run.folder, make_console()
    trials = count_trials(definition, run.sampler, len(journal.record.trials))
    ended = sum(record.ended and not record.given_up for record in journal.record.trials.values())
    console.print(introduction(folder, experiment, definition, run.sampler, trials, ended), soft_wrap=True)
    check_launcher(journal, experiment.launcher)
    dispatcher = make_dispatcher(experiment.launcher, folder)  # before the slow checks: it checks the launcher's settings
    if ended < trials and check:
        console.print("checking model, SAE and data; the first time may download or convert the model", style="dim")
        print_preflight(console, known_trial_needs(*variants(experiment, definition)))
    online = experiment.tracker.mode == "wandb" and run.agent_run is None and bool(definition.raw)

    def new_id() -> str:
        registered = create_sweep(folder.definition, experiment.tracker) if online else None
        return run.agent_run.sweep_id if run.agent_run else registered or new_sweep_id()

    # again: the preflight may have downloaded files to the Hub's cache
    check_files(run.parent_folder, result_files(experiment, definition))
    begin_sweep(experiment, definition, folder, journal, fingerprint, new_id)
    sweep_id = journal.record.sweep_id
    factory = TrialFactory(experiment, definition, folder, sweep_id, git_commit(), run.overrides, run.agent_run)
    state = make_state(journal, run.sampler, factory, trials, make_early_stopping(experiment, definition))
    state.restore(revive_pruned=run.agent_run is not None)  # an agent that starts the run again resumes it
    stopped = run_controller(factory, state, dispatcher, trials) > 0
    if online and all(record.ended for record in journal.record.trials.values()):
        finish_sweep(sweep_id, experiment.tracker)
    return conclude(run, console, journal, trials, stopped, show)


def conclude(run: SweepRun, console: Console, journal: Journal, trials: int, stopped: bool, show: bool) -> int:
    """Write and print the leaderboard; the exit code.

    Args:
        run: the sweep.
        console: where to print.
        journal: the sweep's, still open.
        trials: the number of trials of the sweep.
        stopped: whether a user asked to stop.
        show: whether to print the leaderboard.
    """
    folder = run.parent_folder
    records = list(journal.record.trials.values())
    sweep = read_sweep_folder(folder.path, ending=True)
    leaderboard.write_csv(sweep, folder.leaderboard)
    refresh_cards(sweep)
    ended = sum(record.ended for record in records)
    completed = any(r.state is TrialState.COMPLETED for r in records)
    if ended and show:
        leaderboard.show(console, sweep)
    if stopped:
        console.print(f"Stopped with {ended} of {trials} trials ended; nothing is left running. The same command resumes.")
        return INTERRUPTED
    if ended < trials and completed:
        why = _why_ended_early(run, journal)
        write_text(run.folder.why_ended, f"{ended} of {trials} trials: {why}.")
        console.print(f"Ended after {ended} of {trials} trials: {why}.", soft_wrap=True)
    elif ended < trials:
        reason = next((r.message for r in records if r.given_up), "")
        console.print(f"Ended after {ended} trials, since none of them completed: {reason}", soft_wrap=True, style="red")
    given_up = any(record.given_up for record in records)
    if given_up and folder.journal.is_file():  # with agents their server decides what runs again
        console.print(given_up_note(records, folder), style="yellow")
    return 0 if completed and not given_up else 1


def _why_ended_early(run: SweepRun, journal: Journal) -> str:
    """Why the sweep has no further trial although some are left of its ``run_cap``."""
    records = journal.record.trials.values()
    reached = next((r for r in records if run.definition.reached_by(r.metric) and not r.violation), None)
    if reached is not None:
        return f"trial {reached.index + 1} has reached the sweep file's metric.target, {run.definition.target:g}"
    enough = make_stop_rule(run.experiment.sweep, journal, run.sampler)()
    return enough or "the space has no further point"
