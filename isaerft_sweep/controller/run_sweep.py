"""Runs the sweep that an experiment describes, from preflight to leaderboard."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import yaml
from rich.console import Console

from isaerft_sweep.config.boundary import to_definition, variants, with_sweeps_project
from isaerft_sweep.controller.controller_info import write_controller_info
from isaerft_sweep.controller.early import EarlyStopping
from isaerft_sweep.controller.live_view import LiveView
from isaerft_sweep.controller.loop import SweepController
from isaerft_sweep.controller.preflight import check_disk, known_trial_needs
from isaerft_sweep.controller.stop_signal import AT_ONCE, IN_ORDER, StopRequest
from isaerft_sweep.controller.sweep_identity import (
    check_files,
    known_fingerprints,
    open_journal,
    result_files,
    settings,
    sweep_folder,
)
from isaerft_sweep.controller.trial_activity import given_up_words
from isaerft_sweep.controller.trial_factory import AgentRun, TrialFactory, new_sweep_id
from isaerft_sweep.dispatch.base import Dispatcher
from isaerft_sweep.errors import FolderError, LaunchError
from isaerft_sweep.journal.atomic_files import write_json, write_text
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.journal.layout import COMPLETED, SweepFolder
from isaerft_sweep.provenance import describe_environment, git_commit
from isaerft_sweep.results import leaderboard
from isaerft_sweep.results.card import refresh_cards
from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.search.pruning import evaluations, make_pruner, rungs
from isaerft_sweep.search.sampler import FixedPoints, PointSource, Sampler
from isaerft_sweep.search.sweep_file import Metric, SweepDefinition
from isaerft_sweep.spec_fields import to_dict
from isaerft_sweep.specs import Experiment, LauncherSpec
from isaerft_sweep.terminal import make_console
from isaerft_sweep.tracking.announce import create_sweep, finish_sweep

INTERRUPTED = 130
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG)
FILE_ERRORS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR)
"""Of one file, which such an error names."""


def run_sweep(experiment: Experiment, overrides: Sequence[str] = ()) -> int:
    """Run or go on with the sweep; the process's exit code: 0, 1 when no trial completed or one was given up, 130
    when stopped.

    Raises IsaerftError before any trial is dispatched when something is wrong that the user can mend.
    """
    definition = to_definition(experiment.sweep, experiment)
    folder = sweep_folder(experiment, definition)
    return run_trials(experiment, definition, make_sampler(experiment, definition), folder, overrides)


def run_trials(
    experiment: Experiment,
    definition: SweepDefinition,
    sampler: PointSource,
    folder: SweepFolder,
    overrides: Sequence[str] = (),
    asked: str | None = None,
    show: bool = True,
    given: AgentRun | None = None,
    check: bool = True,
) -> int:
    """Run the points that ``sampler`` gives as the sweep in ``folder``; see ``run_sweep``.

    Args:
        experiment: what every trial has in common.
        definition: the metric, and what is written into ``sweep.yaml``.
        sampler: gives the points.
        folder: the sweep's; goes on with what is in it.
        overrides: the command line's, for the command that reproduces a trial.
        asked: what tells this sweep from another in the same folder; None: the experiment's and definition's question.
        show: whether to print the leaderboard at the end.
        given: of the one run, when an agent has started this.
        check: whether model, SAE and data are looked at before the first trial.
    """
    console = make_console()
    with disk_errors_named(folder):
        check_disk(folder.path, experiment.launcher.min_free_gb)
        known_as = [asked] if asked else known_fingerprints(experiment, definition)
        experiment = with_sweeps_project(experiment, definition)
        files = result_files(experiment, definition)
        journal = open_journal(folder, known_as, settings(experiment, definition), files)
        try:
            trials = count_trials(definition, sampler, len(journal.record.trials))
            ended = sum(record.ended and not record.given_up for record in journal.record.trials.values())
            console.print(introduction(folder, experiment, definition, sampler, trials, ended), soft_wrap=True)
            check_place(journal, experiment.launcher)
            dispatcher = make_dispatcher(experiment.launcher, folder)  # first of all: a cluster's answer takes no time
            if ended < trials and check:
                console.print("checking model, SAE and data; the first time may download or convert the model", style="dim")
                print_facts(console, known_trial_needs(*variants(experiment, definition)))
            online = experiment.tracker.mode == "wandb" and given is None and bool(definition.raw)

            def named() -> str:
                known = create_sweep(folder.definition, experiment.tracker) if online else None
                return given.sweep_id if given else known or new_sweep_id()

            # again, since the check may have fetched what the Hub's cache did not hold
            check_files(given.parent_sweep if given else folder, result_files(experiment, definition))
            begin_sweep(experiment, definition, folder, journal, known_as[0], named)
            stop = StopRequest(folder.cancel, given.agent if given else None)
            with (
                stop.heard(),
                write_controller_info(folder, trials, overrides),
                LiveView(console, definition.metric.name, trials, folder) as view,
                closed_in_the_end(dispatcher),
            ):
                stop.tell = lambda asked: view.note(asked.words(experiment.launcher.grace_s))
                sweep_id = journal.record.sweep_id
                factory = TrialFactory(experiment, definition, folder, sweep_id, git_commit(), overrides, given)
                early = make_early_stopping(experiment, definition)
                SweepController(
                    journal, sampler, factory, dispatcher, experiment.launcher, trials, view, lambda: stop.urgency, early,
                    revive=given is not None,  # whoever starts a run again that was stopped early wants it to go on
                ).run()  # fmt: skip
                stopped = stop.urgency > 0
            if online and all(record.ended for record in journal.record.trials.values()):
                finish_sweep(journal.record.sweep_id, experiment.tracker)
            whole = given.parent_sweep if given else folder
            return conclude(console, whole, journal, trials, stopped, show, definition)
        finally:
            journal.close()


@contextmanager
def closed_in_the_end(dispatcher: Dispatcher) -> Iterator[None]:
    """Close the dispatcher after the block; an error of the block is told, not one that closing meets because of it."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            dispatcher.close()
        raise
    dispatcher.close()


def check_place(journal: Journal, launcher: LauncherSpec) -> None:
    """Raise LaunchError when trials are under way that another kind of launcher has started."""
    place = place_of_jobs(journal)
    if place not in (None, (launcher.kind, launcher.resident)):
        assert place is not None
        raise LaunchError(
            f"trials of {journal.folder.path} are under way, as far as is known, which launcher={place[0]} "
            f"launcher.resident={str(place[1]).lower()} has started: the sweep must go on with the same. Or end them first: "
            f"isaerft-sweep cancel {journal.folder.path}."
        )


def place_of_jobs(journal: Journal) -> tuple[str, bool] | None:
    """Launcher and ``resident`` of the trials that are under way; None when there are none."""
    for record in journal.record.trials.values():
        if record.job is not None and not record.ended:
            return str(record.job.get("job", record.job)["kind"]), record.job["kind"] == "resident"
    return None


@contextmanager
def disk_errors_named(folder: SweepFolder) -> Iterator[None]:
    """Turn an error of the disk, which may come from any write, into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (DISK_ERRORS if error.filename is None else (*DISK_ERRORS, *FILE_ERRORS)):
            raise
        raise FolderError(
            f"{error.filename or folder.path} cannot be written ({error.strerror}). Make room or mend the disk, then run "
            "the same command again: nothing that has finished is lost."
        ) from error


def end_jobs(experiment: Experiment, folder: SweepFolder, at_once: bool) -> None:
    """End all jobs of a sweep that no controller runs, in order or at once."""
    journal = Journal(folder)
    try:
        kind, resident = place_of_jobs(journal) or (experiment.launcher.kind, experiment.launcher.resident)
        launcher = replace(experiment.launcher, kind=kind, resident=resident)
        factory = TrialFactory(experiment, SweepDefinition("given points", Metric("", "maximize"), {}), folder, "", None)
        urgency = AT_ONCE if at_once else IN_ORDER
        with (
            disk_errors_named(folder),
            LiveView(make_console(), journal.record.metric, len(journal.record.trials), folder) as view,
        ):
            dispatcher = make_dispatcher(launcher, folder)
            with closed_in_the_end(dispatcher):
                SweepController(journal, FixedPoints([]), factory, dispatcher, launcher, 0, view, lambda: urgency).run()
    finally:
        journal.close()


def make_sampler(experiment: Experiment, definition: SweepDefinition) -> Sampler:
    """The sampler of the definition's method."""
    sweep = experiment.sweep
    return Sampler(definition.parameters, definition.method, sweep.seed, definition.metric.sign, sweep.repeats)


def make_early_stopping(experiment: Experiment, definition: SweepDefinition) -> EarlyStopping | None:
    """What the sweep file's ``early_terminate`` asks for."""
    pruner = make_pruner(definition.early_terminate, evaluations_per_trial(experiment))
    return EarlyStopping(pruner, definition.metric.sign, evaluations_per_trial(experiment)) if pruner else None


def evaluations_per_trial(experiment: Experiment) -> int:
    """How often a trial is evaluated after its first step."""
    return evaluations(experiment.orpo.eval_fraction, experiment.orpo.max_steps)


def count_trials(definition: SweepDefinition, sampler: PointSource, existing: int) -> int:
    """How many trials the sweep shall have: its cap, or fewer when the space has no more points."""
    cap = definition.run_cap if definition.run_cap is not None else sampler.size
    endless = sampler.repeats and sampler.method != "grid"
    return max(existing, int(cap if endless else min(cap, sampler.size)))


def make_dispatcher(launcher: LauncherSpec, folder: SweepFolder) -> Dispatcher:
    """The place where trials run."""
    inner = make_inner_dispatcher(launcher, folder)
    if not launcher.resident:
        return inner
    from isaerft_sweep.dispatch.worker_pool import ResidentDispatcher

    return ResidentDispatcher(inner, folder.workers, launcher.poll_s, launcher.trials_per_job, launcher.trials_per_pass)


def make_inner_dispatcher(launcher: LauncherSpec, folder: SweepFolder) -> Dispatcher:
    """The place where jobs run, without workers that stay."""
    if launcher.kind == "slurm":
        from isaerft_sweep.dispatch.slurm import SlurmDispatcher

        return SlurmDispatcher(launcher, folder.jobs)
    from isaerft_sweep.dispatch.local import LocalDispatcher

    return LocalDispatcher(launcher, folder.jobs)


def begin_sweep(
    experiment: Experiment,
    definition: SweepDefinition,
    folder: SweepFolder,
    journal: Journal,
    asked: str | None = None,
    named: Callable[[], str] = new_sweep_id,
) -> None:
    """Write down what the sweep is, if that has not been done yet; ``named`` gives its id, after its file is written.

    One that goes on does so as the last command says, with another cap or launcher, say: so will ``attach``.
    """
    if journal.record.sweep_id:
        write_settings(experiment, definition, folder)
    else:
        write_definition(experiment, definition, folder)
        asked, metric = asked or known_fingerprints(experiment, definition)[0], definition.metric
        journal.write("sweep", sweep_id=named(), question=asked, metric=metric.name, goal=metric.goal)


def write_definition(experiment: Experiment, definition: SweepDefinition, folder: SweepFolder) -> None:
    """What was asked, for people: the sweep file, the composed config, and what it is run with."""
    write_settings(experiment, definition, folder)
    write_json(folder.environment, describe_environment())


def write_settings(experiment: Experiment, definition: SweepDefinition, folder: SweepFolder) -> None:
    """The sweep file and the composed config, where they are not there yet as they are now."""
    for path, content in ((folder.definition, dict(definition.raw)), (folder.config, to_dict(experiment))):
        text = yaml.safe_dump(content, sort_keys=False)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def introduction(
    folder: SweepFolder, experiment: Experiment, definition: SweepDefinition, sampler: PointSource, trials: int, ended: int
) -> str:
    """What is about to happen, in two or three lines."""
    size = "" if sampler.size == math.inf else f" of {sampler.size:g} points"
    done = f", {ended} already ended" if ended else ""
    name = f" ({definition.name})" if definition.name else ""
    target = (
        "" if definition.target is None else f"\n       ends when {definition.metric.name} reaches {definition.target:g}"
    )
    notes = "".join(f"\n       {note}" for note in definition.notes)
    early = early_words(experiment, definition)
    return (
        f"sweep  {folder.path}{name}\n       {trials} trials{size}, method {definition.method}{done}{target}{early}{notes}"
    )


def early_words(experiment: Experiment, definition: SweepDefinition) -> str:
    """What early stopping will do, in a line."""
    asked, number = definition.early_terminate, evaluations_per_trial(experiment)
    if asked is None:
        return ""
    places = rungs(asked, number) if asked["type"] == "hyperband" else [n for n in [int(asked["min_iter"])] if n < number]
    if not places:
        return f"\n       early_terminate stops nothing: a trial has {number} evaluations. More: orpo.eval_fraction=0.1"
    return f"\n       stopped early ({asked['type']}) after evaluation {', '.join(map(str, places))} of {number}"


def print_facts(console: Console, facts: dict[str, Any]) -> None:
    """What the preflight found."""
    lines = [f"model  {facts['model']}", *(f"SAE    {sae}" for sae in facts["saes"]), f"data   {facts['data']}"]
    if facts["more"]:
        lines.append(f"       and {facts['more']} more that the sweep's points name")
    console.print("\n".join(lines), soft_wrap=True, highlight=False)


def conclude(
    console: Console,
    folder: SweepFolder,
    journal: Journal,
    trials: int,
    stopped: bool,
    show: bool,
    definition: SweepDefinition,
) -> int:
    """Write and print the leaderboard; the exit code."""
    records = list(journal.record.trials.values())
    sweep = read_sweep_folder(folder.path)
    sweep.is_run = False  # but for this process, which is at its end
    leaderboard.write_csv(sweep, folder.leaderboard)
    refresh_cards(sweep)
    ended = sum(record.ended for record in records)
    if ended and show:
        leaderboard.show(console, sweep)
    if stopped:
        console.print(f"Stopped with {ended} of {trials} trials ended; nothing is left running. The same command goes on.")
        return INTERRUPTED
    reached = next((r for r in records if definition.reached_by(r.metric)), None)
    if reached is not None and ended < trials:
        console.print(
            f"Ended after {ended} of {trials} trials: trial {reached.index + 1} has reached the sweep file's metric.target, "
            f"{definition.target:g}.",
            soft_wrap=True,
        )
    elif ended < trials and any(r.state == COMPLETED for r in records):
        console.print(f"Ended after {ended} of {trials} trials: the space has no further point.")
    elif ended < trials:
        reason = next((r.message for r in records if r.given_up), "")
        console.print(f"Ended after {ended} trials, since none of them completed: {reason}", soft_wrap=True, style="red")
    given_up = any(record.given_up for record in records)
    if given_up and folder.journal.is_file():  # an agent decides by itself what it runs again
        console.print(given_up_words(records, folder), style="yellow")
    return 0 if any(r.state == COMPLETED for r in records) and not given_up else 1
