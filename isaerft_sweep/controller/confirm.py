"""Runs the best trials of a finished sweep again with new seeds."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.controller.run_sweep import SweepRun, run_trials
from isaerft_sweep.controller.sweep_identity import check_files, known_fingerprints, result_files
from isaerft_sweep.errors import ConfigError, FolderError
from isaerft_sweep.journal.journal import read_record
from isaerft_sweep.results import confirmation
from isaerft_sweep.results.card.model_card import refresh_cards
from isaerft_sweep.results.confirm_folder import confirm_folder, confirmation_fingerprint
from isaerft_sweep.results.leaderboard import print_whole, short_path
from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.results.sweep_results import RankedTrial, SweepResults, by_point, kind_of, trial_of
from isaerft_sweep.search.sampler import FixedPoints, Point
from isaerft_sweep.search.seeded import SEED, WITHOUT_SEEDS
from isaerft_sweep.search.sweep_file import SweepDefinition
from isaerft_sweep.spec_fields import from_mapping, to_dict
from isaerft_sweep.specs import Experiment
from isaerft_sweep.terminal import make_console

SETTINGS = ("launcher", "tracker")
"""Config sections that may differ from the first sweep's: they cannot change a result."""


def confirm(path: Path, metric: str | None, top: int, seeds: int, settings: Sequence[str] = ()) -> int:
    """Run the ``top`` best trials of the sweep in ``path`` with ``seeds`` new seeds each, and print the best one.

    They run as a separate sweep beside the first, ``NAME-confirm``: the same command resumes it after a stop, and a larger
    ``top`` or ``seeds`` adds trials. Returns the exit code of ``run_sweep``.

    Args:
        path: the first sweep's folder.
        metric: ranks the trials; None: the sweep's own.
        top: how many of the best trials to run again.
        seeds: how many new seeds each gets.
        settings: ``launcher.…=`` and ``tracker.…=`` overrides.

    Raises ConfigError or FolderError, before any trial runs, when the sweep cannot be confirmed.
    """
    for name, value in (("--top", top), ("--seeds", seeds)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1 but got {value}.")
    sweep = read_sweep_folder(path, metric)
    assert sweep.folder is not None
    if sweep.folder.agent_run_folders():
        raise FolderError(
            f"the trials in {sweep.source} were started by W&B agents, which alone may add to them. Run a leader again with "
            f"another seed by itself: {sweep.best_command()} orpo.seed=43"
        )
    if sweep.experiment is None:
        raise FolderError(f"{sweep.folder.config} must hold the sweep's config, but it is not there or was changed by hand.")
    leaders = find_leaders(sweep)[:top]
    if not leaders:
        sweep.best()  # raises, unless a trial completed
        raise FolderError(f"no trial of {sweep.source} varies over seeds: {', '.join(WITHOUT_SEEDS)} is the same with each.")
    target = confirm_folder(sweep.folder)
    experiment = with_settings(sweep.experiment, settings)
    sweep_settings = dataclasses.replace(experiment.sweep, emulate=False)  # nothing is emulated from other seeds
    experiment = dataclasses.replace(experiment, output=str(target.path.parent), name=target.path.name, sweep=sweep_settings)
    used = max(int(entry.params.get(SEED, experiment.orpo.seed)) for entry in sweep.entries)
    points = [point_with_seed(entry, used + step) for step in range(1, seeds + 1) for entry in leaders]
    definition = SweepDefinition("given points", sweep.metric, {}, raw={})
    fingerprint = confirmation_fingerprint(_check_unchanged(sweep))
    run = SweepRun(experiment, definition, FixedPoints(points), target, _overrides(leaders[0]), fingerprint)
    code = run_trials(run, show=False)
    sweep = read_sweep_folder(path, metric)
    refresh_cards(sweep)
    show(make_console(), sweep)
    return code


def find_leaders(sweep: SweepResults) -> list[RankedTrial]:
    """The ranked trials that vary over seeds, best first; of those that differ only in their seed the best one."""
    varying = (entry for entry in sweep.entries if entry.rank and kind_of(entry, sweep) not in WITHOUT_SEEDS)
    return [entries[0] for entries in by_point(varying)]


def point_with_seed(entry: RankedTrial, seed: int) -> Point:
    """The entry's point with another seed."""
    return Point({**entry.params, SEED: seed}, dict(entry.record.point.unit))


def show(console: Console, sweep: SweepResults) -> None:
    """Print the results of the new seeds."""
    candidates = confirmation.read_confirmation(sweep)
    if not candidates:
        console.print("No trial with a new seed has completed.", style="red")
        return
    print_whole(console, confirmation.table(sweep, candidates))
    console.print(confirmation.summary(sweep), soft_wrap=True)
    console.print(f"Best trial: {short_path(trial_of(sweep.best()).path)}", soft_wrap=True)


def with_settings(experiment: Experiment, settings: Sequence[str]) -> Experiment:
    """``experiment`` with ``launcher.slots=2`` and the like applied. Raises ConfigError for anything else."""
    changed: Any = experiment
    for text in settings:
        key, equals, value = text.partition("=")
        section, _, name = key.partition(".")
        if not equals or not name or section not in SETTINGS:
            raise ConfigError(
                f"only launcher.KEY=VALUE and tracker.KEY=VALUE can be set here, since all else comes from the first sweep, "
                f"but got '{text}'."
            )
        spec = getattr(changed, section)
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key} must be a YAML value but got '{value}'.") from error
        updated = from_mapping(type(spec), {**to_dict(spec), name: parsed}, section)
        changed = dataclasses.replace(changed, **{section: updated})
    return changed  # type: ignore[no-any-return]


def _check_unchanged(sweep: SweepResults) -> str:
    """The first sweep's fingerprint. Raises FolderError when its config, data or SAE have changed."""
    assert sweep.folder is not None and sweep.experiment is not None
    record = read_record(sweep.folder)
    spec = sweep.experiment.sweep
    if spec.file is not None:
        spec = dataclasses.replace(spec, file=str(sweep.folder.definition))
    definition = to_definition(spec, sweep.experiment)
    if record.fingerprint not in known_fingerprints(sweep.experiment, definition):
        raise FolderError(
            f"the sweep in {sweep.folder.path} must be unchanged, but its config, its sweep.yaml, its data files or its SAE "
            "have changed since: new runs could not be compared with the old. Restore them, or start a new sweep."
        )
    check_files(sweep.folder, result_files(sweep.experiment, definition))
    return record.fingerprint


def _overrides(leader: RankedTrial) -> list[str]:
    """The overrides of the first sweep's command line that concern a trial."""
    command = shlex.split(trial_of(leader).read_spec().command)
    return command[3 : command.index("sweep=none")] if "sweep=none" in command else []
