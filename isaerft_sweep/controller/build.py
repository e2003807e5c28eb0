"""Builds the parts of a controller from specs: sampler, early stopping, dispatcher, state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from isaerft_sweep.controller.emulated_search import EmulatedSearch, check_emulation
from isaerft_sweep.controller.prior import Result
from isaerft_sweep.controller.stop_rule import make_stop_rule
from isaerft_sweep.controller.trial_factory import TrialFactory
from isaerft_sweep.dispatch.base import Dispatcher
from isaerft_sweep.errors import ConfigError, LaunchError
from isaerft_sweep.journal.job_refs import WorkerTask
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.paths import quoted
from isaerft_sweep.scheduling.early_stopping import EarlyStopping
from isaerft_sweep.scheduling.sweep_state import SweepLimits, SweepState
from isaerft_sweep.search.pruning import evaluations, make_pruner
from isaerft_sweep.search.sampler import PointSource, Sampler, ShuffledGrid
from isaerft_sweep.search.seeded import SEED, WITHOUT_SEEDS, SeededPoints
from isaerft_sweep.search.start_points import StartPoints, point_in
from isaerft_sweep.search.sweep_file import SweepDefinition
from isaerft_sweep.specs import Experiment, LauncherSpec, swept_value


def make_sampler(
    experiment: Experiment,
    definition: SweepDefinition,
    earlier: Sequence[Sequence[Result]] = (),
    folder: SweepFolder | None = None,
) -> PointSource:
    """The sampler of the definition's method; with ``sweep.seeds`` it gives good points new seeds.

    Args:
        experiment: the composed config.
        definition: the sweep file.
        earlier: results of earlier sweeps that it learns from.
        folder: the sweep's, in which trials leave what ``sweep.emulate`` needs; None: another process samples.
    """
    sweep, sign = experiment.sweep, definition.metric.sign
    goals = max(1, len(definition.goals))
    kind = ShuffledGrid if sweep.shuffle else Sampler
    if sweep.shuffle and definition.method != "grid":
        raise ConfigError(
            f"sweep.shuffle must go with method grid, whose points have an order, but got {definition.method}."
        )
    own = kind(definition.parameters, definition.method, sweep.seed, sign, sweep.repeats, goals)
    if earlier:
        own.learn(earlier)
    sampler: PointSource = own
    if sweep.emulate:
        check_emulation(own, experiment, definition)
        if folder is None:
            raise ConfigError(
                "sweep.emulate must go with isaerft_sweep.launch, which chooses the points itself. Leave it out."
            )
        sampler = EmulatedSearch(own, experiment, definition, folder)
    if sweep.start:
        points = [point_in(definition.parameters, values, partial(swept_value, experiment)) for values in sweep.start]
        sampler = StartPoints(sampler, points)
    if sweep.seeds == 1:
        return sampler
    excludes = {SEED: SEED in definition.parameters, "sweep.repeats": sweep.repeats, "metrics": goals > 1}
    if any(excludes.values()):
        other = next(name for name, is_given in excludes.items() if is_given)
        raise ConfigError(
            f"sweep.seeds={sweep.seeds} gives each point its seeds and must not go with {other}. Leave one out."
        )
    configured = experiment.adapter.kind
    return SeededPoints(
        sampler,
        sweep.seeds,
        experiment.orpo.seed,
        sign,
        varies=lambda params: params.get("adapter.kind", configured) not in WITHOUT_SEEDS,
    )


def make_early_stopping(experiment: Experiment, definition: SweepDefinition) -> EarlyStopping | None:
    """The early stopping of the sweep file's ``early_terminate``; None without one."""
    number = evaluations_per_trial(experiment)
    pruner = make_pruner(definition.early_terminate, number)
    return EarlyStopping(pruner, definition.metric.sign, number) if pruner else None


def evaluations_per_trial(experiment: Experiment) -> int:
    """The number of evaluations of a trial after its first step."""
    return evaluations(experiment.orpo.eval_fraction, experiment.orpo.max_steps)


def count_trials(definition: SweepDefinition, sampler: PointSource, existing: int) -> int:
    """The number of trials of the sweep: its cap, or fewer when the space has fewer points."""
    cap = definition.run_cap if definition.run_cap is not None else sampler.size
    endless = sampler.repeats and sampler.method != "grid"
    return max(existing, int(cap if endless else min(cap, sampler.size)))


def make_state(
    journal: Journal, sampler: PointSource, factory: TrialFactory, trials: int, early: EarlyStopping | None = None
) -> SweepState:
    """The sweep's state machine, not restored yet.

    Args:
        journal: the sweep's.
        sampler: gives the points.
        factory: creates the trials.
        trials: the number of trials of the sweep.
        early: stops poor trials early.
    """
    launcher, definition = factory.experiment.launcher, factory.definition
    reached = None if definition.target is None else definition.reached_by
    retries, failures = launcher.max_retries, launcher.max_failures
    enough = make_stop_rule(factory.experiment.sweep, journal, sampler)
    limits = SweepLimits(trials, retries, failures, reached, definition.violation, definition.others, enough)
    return SweepState(journal, sampler, limits, factory.create, early)


def make_dispatcher(launcher: LauncherSpec, folder: SweepFolder) -> Dispatcher[Any]:
    """The dispatcher of trials: resident workers, unless ``launcher.resident=false``."""
    inner = make_inner_dispatcher(launcher, folder)
    if not launcher.resident:
        return inner
    from isaerft_sweep.dispatch.worker_pool import ResidentDispatcher

    return ResidentDispatcher(inner, folder.workers, launcher.poll_s, launcher.trials_per_job, launcher.trials_per_pass)


def make_inner_dispatcher(launcher: LauncherSpec, folder: SweepFolder) -> Dispatcher[Any]:
    """The dispatcher of jobs, without resident workers."""
    if launcher.kind == "slurm":
        from isaerft_sweep.dispatch.slurm.dispatcher import SlurmDispatcher

        return SlurmDispatcher(launcher, folder.jobs)
    from isaerft_sweep.dispatch.local import LocalDispatcher

    return LocalDispatcher(launcher, folder.jobs)


def check_launcher(journal: Journal, launcher: LauncherSpec) -> None:
    """Raise LaunchError when a launcher with other settings has started trials that may still run."""
    started_by = launcher_of_jobs(journal)
    if started_by not in (None, (launcher.kind, launcher.resident)):
        assert started_by is not None
        raise LaunchError(
            f"trials of {journal.folder.path} that launcher={started_by[0]} "
            f"launcher.resident={str(started_by[1]).lower()} has started may still run: resume the sweep with the same, or "
            f"end them first: isaerft-sweep cancel {quoted(journal.folder.path)}."
        )


def launcher_of_jobs(journal: Journal) -> tuple[str, bool] | None:
    """``launcher`` and ``launcher.resident`` of the trials that are under way; None when none are."""
    for record in journal.record.trials.values():
        if record.job is not None and not record.ended:
            return record.job.process.kind, isinstance(record.job, WorkerTask)
    return None
