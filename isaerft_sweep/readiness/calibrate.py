"""Estimates a trial's time from earlier sweeps with the same settings, or from a short calibration trial."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from isaerft_sweep.controller.build import evaluations_per_trial, make_inner_dispatcher
from isaerft_sweep.controller.trial_factory import TrialFactory
from isaerft_sweep.dispatch.job import TrialJob
from isaerft_sweep.errors import ConfigError, IsaerftError, LaunchError
from isaerft_sweep.journal.journal import read_record
from isaerft_sweep.journal.layout import SweepFolder, TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import TrialStatus
from isaerft_sweep.results.cost import device_seconds
from isaerft_sweep.search.sampler import Point
from isaerft_sweep.search.sweep_file import SweepDefinition
from isaerft_sweep.specs import Experiment, comparable

STEPS = 8
"""Steps of a calibration trial. The first ones are slower and do not count."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one trial, its share of device time, and a description of the source."""

    seconds: float
    device_s: float
    source: str


def from_earlier_sweeps(experiment: Experiment, swept: Collection[str]) -> Estimate | None:
    """The median time of completed trials whose settings differ only in the swept ones; None without any."""
    seconds: list[float] = []
    shares: list[float] = []
    names = []
    for journal in sorted(Path(experiment.output).expanduser().absolute().glob("*/journal.jsonl")):
        folder = SweepFolder(journal.parent)
        try:
            earlier = folder.read_config()
            if comparable(earlier, swept) != comparable(experiment, swept):
                continue
            record = read_record(folder)
        except IsaerftError:
            continue  # written by another version, or incomplete
        completed = [trial for trial in record.trials.values() if trial.state == TrialState.COMPLETED and trial.seconds > 0]
        if completed:
            names.append(folder.path.name)
            seconds += [trial.seconds for trial in completed]
            shared = device_seconds(record.trials.values(), earlier.launcher.trials_per_gpu)
            shares += [shared[trial.index] for trial in completed]
    if not seconds:
        return None
    return Estimate(
        statistics.median(seconds), statistics.fmean(shares), f"median of {len(seconds)} trials of {', '.join(names)}"
    )


def calibrate(experiment: Experiment, definition: SweepDefinition, point: Point, steps: int) -> Estimate:
    """Run ``STEPS`` steps of one trial through the launcher, and extrapolate to a whole trial.

    Args:
        experiment: the composed config.
        definition: the sweep.
        point: the params of the trial to run.
        steps: optimiser steps of a whole trial.

    Raises LaunchError when the calibration trial does not complete.
    """
    output = Path(experiment.output).expanduser().absolute()
    output.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output, prefix=".calibration-"))
    folder = SweepFolder(temporary / "calibration")  # one level deeper, so that the trial's name is reserved inside it too
    orpo = dataclasses.replace(experiment.orpo, max_steps=min(STEPS, steps), eval_untrained="never", eval_fraction=1.0)
    tracker = dataclasses.replace(experiment.tracker, mode="disabled")
    short = dataclasses.replace(experiment, orpo=orpo, tracker=tracker)
    try:
        spec = TrialFactory(short, definition, folder, "calibration", None).make(0, point)
        trial = folder.trial(spec.name)
        trial.begin_attempt(1)
        dispatcher = make_inner_dispatcher(experiment.launcher, folder)
        job = dispatcher.submit(TrialJob(str(trial.path), 1, dispatcher.threads))
        try:
            while dispatcher.alive([job])[0]:
                time.sleep(min(1.0, experiment.launcher.poll_s))
        finally:
            dispatcher.kill([job])
        status = trial.read_status()
        if status.state is not TrialState.COMPLETED:
            raise LaunchError(
                f"the calibration must complete but ended as {status.state or 'nothing'}: {status.message} "
                f"{dispatcher.job_exit(job).reason}\n{dispatcher.log_tail(job)}"
            )
        alone_s = extrapolate_seconds(trial, status, steps, evaluations_per_trial(experiment))
        return Estimate(alone_s, alone_s, f"{orpo.max_steps} steps, run just now by itself")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def extrapolate_seconds(trial: TrialFolder, status: TrialStatus, steps: int, evaluations: int) -> float:
    """Seconds of a whole trial, extrapolated from a short one.

    Args:
        trial: the folder of the short trial.
        status: its final status; start-up and shutdown take the same time in a whole trial.
        steps: optimiser steps of a whole trial.
        evaluations: evaluations of a whole trial.
    """
    rows = trial.read_metrics()
    trained = [row["time"] for row in rows if "train/loss" in row]
    evaluated = [row["time"] for row in rows if any(key.startswith("eval/") for key in row)]
    if len(trained) < 2 or not evaluated:
        raise ConfigError("a calibration needs trials of at least two steps. Set a larger orpo.max_steps, or remove it.")
    gaps = [after - before for before, after in itertools.pairwise(trained)]
    step_s, evaluation_s = statistics.median(gaps), max(0.0, evaluated[-1] - trained[-1])
    overhead_s = max(0.0, status.duration_s - (trained[-1] - trained[0]) - step_s - evaluation_s)
    return float(overhead_s + steps * step_s + evaluations * evaluation_s)
