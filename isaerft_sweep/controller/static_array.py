"""Trials that are created ahead and run without a controller: a SLURM array, one element per trial."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

from isaerft_sweep.config.boundary import to_definition, variants, with_sweeps_project
from isaerft_sweep.controller.build import count_trials, make_sampler, make_state
from isaerft_sweep.controller.preflight import known_trial_needs
from isaerft_sweep.controller.sweep_identity import (
    begin_sweep,
    check_files,
    known_fingerprints,
    open_journal,
    result_files,
    settings,
    sweep_folder,
)
from isaerft_sweep.controller.trial_factory import TrialFactory
from isaerft_sweep.dispatch.base import SchedulerUnavailable
from isaerft_sweep.dispatch.job import TrialJob
from isaerft_sweep.dispatch.slurm.cluster import COMPLETING_S, SLURM_TERMINAL, cancel_jobs, cluster_of, user_jobs
from isaerft_sweep.dispatch.snapshot import code_snapshot
from isaerft_sweep.errors import ConfigError, FolderError, LaunchError
from isaerft_sweep.journal.atomic_files import write_text
from isaerft_sweep.journal.journal import read_record
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.provenance import git_commit
from isaerft_sweep.specs import Experiment, LauncherSpec, StopSpec

POLL_S = 1.0
TRY_AGAIN = 75
"""Exit code of a trial that was stopped and can resume (EX_TEMPFAIL of sysexits.h)."""


def create_static_trials(experiment: Experiment, overrides: Sequence[str]) -> tuple[Path, int]:
    """Create every trial of a sweep without running any; the sweep's folder and the number of trials.

    Raises ConfigError when the points depend on results that do not exist yet.
    """
    definition = to_definition(experiment.sweep, experiment)
    if definition.method == "bayes" or definition.early_terminate:
        raise ConfigError(
            "trials can be made ahead only when none depends on another's result: sweep.method=random or grid, without "
            f"early_terminate, but got method {definition.method}. Or let a controller run them: slurm/controller.sbatch."
        )
    if experiment.sweep.stop != StopSpec():
        raise ConfigError(
            "trials can be made ahead only without sweep.stop, which looks at results. Leave it out, or let a controller "
            "run them: slurm/controller.sbatch."
        )
    if experiment.sweep.prior:
        raise ConfigError("trials can be made ahead only without sweep.prior, which goes with method bayes. Leave it out.")
    if experiment.sweep.seeds > 1:
        raise ConfigError(
            f"trials can be made ahead only with one seed a point, since good points alone get more, but got sweep.seeds="
            f"{experiment.sweep.seeds}. Let a controller run them: slurm/controller.sbatch."
        )
    folder = sweep_folder(experiment, definition)
    sampler = make_sampler(experiment, definition)
    experiment = with_sweeps_project(experiment, definition)
    files = result_files(experiment, definition)
    journal = open_journal(folder, known_fingerprints(experiment, definition), settings(experiment, definition), files)
    try:
        trials = count_trials(definition, sampler, len(journal.record.trials))
        if not math.isfinite(trials):
            raise ConfigError("the sweep must have a last trial: give sweep.run_cap=N.")
        known_trial_needs(*variants(experiment, definition))
        check_files(folder, result_files(experiment, definition))
        begin_sweep(experiment, definition, folder, journal)
        write_text(folder.static_array, f"{code_snapshot(folder.path / 'code').absolute()}\n")
        factory = TrialFactory(experiment, definition, folder, journal.record.sweep_id, git_commit(), overrides)
        state = make_state(journal, sampler, factory, trials)
        state.restore()
        state.make_all()
        return folder.path, len(journal.record.trials)
    finally:
        journal.close()


def cancel_arrays(folder: SweepFolder) -> None:
    """Cancel the arrays of ``slurm/trials.sbatch`` that run this sweep, and wait until they have ended."""
    end = time.monotonic() + COMPLETING_S
    while jobs := running_arrays(folder.path):
        if set(jobs.values()) == {"COMPLETING"} and time.monotonic() > end:
            print(f"SLURM does not get jobs {', '.join(jobs)} to end: they have been COMPLETING for {COMPLETING_S:g} s.")
            return
        cancel_jobs(*jobs, cluster=cluster_of(LauncherSpec()))
        time.sleep(POLL_S)


def running_arrays(path: Path) -> dict[str, str]:
    """States, by id, of the user's SLURM jobs whose script runs the sweep in ``path``; empty on a machine without SLURM.

    Raises SchedulerUnavailable when SLURM does not answer.
    """
    try:
        jobs = user_jobs(cluster_of(LauncherSpec()))
    except SchedulerUnavailable:
        raise
    except LaunchError:
        return {}
    return {
        job.id: job.state
        for job in jobs
        if job.state not in SLURM_TERMINAL and argument(job.command, job.folder).resolve() == path.resolve()
    }


def argument(command: str, submitted_from: Path) -> Path:
    """The sweep's folder in the command of a script, whose arguments SLURM joins by spaces without quotes.

    The script is the shortest prefix that is a file, the folder the longest prefix of the rest that holds a sweep.
    """
    ends = [match.start() for match in re.finditer(" ", command)]
    begin = next((end for end in ends if Path(command[:end]).is_file()), ends[0] if ends else len(command))
    rest = command[begin + 1 :]
    lengths = [len(rest), *(end - begin - 1 for end in reversed(ends) if end > begin)]
    candidates = [Path(submitted_from, rest[:length]) for length in lengths]
    return next((folder for folder in candidates if SweepFolder(folder).journal.is_file()), candidates[0])


def run_static_trial(path: Path, index: int) -> int:
    """Run or resume one trial in this process; exit code 0, 1 when it failed, ``TRY_AGAIN`` when it was stopped."""
    folder = SweepFolder(path.expanduser().absolute())
    sweep = read_record(folder)
    if index not in sweep.trials:
        raise FolderError(
            f"the sweep in {folder.path} has no trial {index}: it has {len(sweep.trials)}, numbered from 0. "
            "Make them first: isaerft-sweep make OVERRIDES."
        )
    record = sweep.trials[index]
    trial = folder.trial(record.name)
    status = trial.read_status()
    if record.attempt or status.is_final:
        print(f"trial {index} {record.name}: already {'run by a controller' if record.attempt else status.state}")
        return 0
    attempt = trial.current_attempt() + 1
    trial.begin_attempt(attempt)
    state = TrialJob(str(trial.path), attempt, None)()
    print(f"trial {index} {record.name}: {state}")
    codes: dict[str, int] = {TrialState.COMPLETED: 0, TrialState.DIVERGED: 0, TrialState.STOPPED: TRY_AGAIN}
    return codes.get(state, 1)
