"""``isaerft-sweep plan``: what a command would do, before anything is submitted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.controller.build import count_trials, make_sampler
from isaerft_sweep.controller.introduction import introduction
from isaerft_sweep.controller.live_view import duration
from isaerft_sweep.controller.preflight import known_trial_needs
from isaerft_sweep.controller.sweep_identity import sweep_folder
from isaerft_sweep.dispatch.cluster import cluster_of, parse_gres, read_cluster
from isaerft_sweep.dispatch.local import visible_gpus
from isaerft_sweep.dispatch.sbatch_flags import sbatch_parameters, working_s
from isaerft_sweep.errors import ConfigError
from isaerft_sweep.readiness.calibrate import Estimate, calibrate, from_earlier_sweeps
from isaerft_sweep.results.axes import LOG_FAMILIES
from isaerft_sweep.search.distributions import Categorical, Constant, Distribution
from isaerft_sweep.search.sampler import STARTUP, Point
from isaerft_sweep.specs import Experiment, total_steps

WIDTH = 32
"""Characters of a parameter's axis."""


def plan(console: Console, experiment: Experiment, calibrating: bool) -> None:
    """Print trials, space, time and layout; submits nothing but a calibration. Raises IsaerftError as the sweep would."""
    definition = to_definition(experiment.sweep, experiment)
    sampler = make_sampler(experiment, definition)
    trials = count_trials(definition, sampler, 0)
    folder = sweep_folder(experiment, definition)
    console.print(introduction(folder, experiment, definition, sampler, trials, 0), soft_wrap=True, highlight=False)
    known = trials if definition.method != "bayes" else min(trials, STARTUP)
    points = [point for point in (sampler.ask() for _ in range(min(known, 1000))) if point is not None]
    console.print(space_table(definition.parameters, points))
    if known < trials:
        console.print(f"The first {known} trials are known; the {trials - known} after them depend on results.", style="dim")
    lines, workers, gpus = layout(experiment, trials)
    console.print("\n".join(lines), soft_wrap=True, highlight=False)
    estimate = from_earlier_sweeps(experiment, list(definition.parameters))
    if calibrating:
        steps = total_steps(experiment.orpo, int(known_trial_needs(experiment)["pairs"]))
        estimate = calibrate(experiment, definition, points[0], steps)
    most = "at most " if definition.early_terminate or (calibrating and experiment.launcher.trials_per_pass != 1) else ""
    console.print(time_words(estimate, trials, workers, gpus, most), soft_wrap=True, highlight=False)


def space_table(space: Mapping[str, Distribution], points: Sequence[Point]) -> Table:
    """One line per parameter: the trials on its own scale, or how many there are of each value."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("parameter", "scale", "from", "trials on that scale", "to"):
        table.add_column(name, no_wrap=name != "trials on that scale")
    for key, d in space.items():
        name = key.partition(".")[2]
        if isinstance(d, Constant):
            table.add_row(name, "constant", show(d.value), "", "")
        elif isinstance(d, Categorical):
            counts = Counter(show(point.params[key]) for point in points)
            table.add_row(
                name, f"{len(d.values)} values", "", ", ".join(f"{show(v)}: {counts[show(v)]}" for v in d.values), ""
            )
        else:
            places = [point.unit[key] for point in points if key in point.unit]
            kind = "log" if d.family in LOG_FAMILIES else d.family
            table.add_row(name, kind, show(d.at(0.0)), axis(places), show(d.at(1.0)))
    return table


def show(value: object) -> str:
    """A value in three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def axis(places: Sequence[float]) -> str:
    """How many trials are at each place of the unit interval: ``·`` none, ``1`` to ``9``, ``+`` more."""
    counts = [0] * WIDTH
    for place in places:
        counts[min(WIDTH - 1, int(place * WIDTH))] += 1
    return "".join("·" if count == 0 else str(count) if count < 10 else "+" for count in counts)


def layout(experiment: Experiment, trials: int) -> tuple[list[str], int, int]:
    """What will be submitted, in words; how many trials run at a time, and on how many GPUs each."""
    launcher = experiment.launcher
    kind = "workers, each for many trials" if launcher.resident else "jobs, one per trial"
    if launcher.trials_per_job:
        kind = f"workers, each for {launcher.trials_per_job} trials"
    together = launcher.trials_per_pass or 1
    if launcher.trials_per_pass != 1:
        kind += f", {launcher.trials_per_pass or 'as many as pay'} together"
    if launcher.kind == "local":
        devices = visible_gpus()
        workers = min(-(-trials // together), launcher.slots or max(1, len(devices)) * launcher.trials_per_gpu)
        where = f"{len(devices)} GPUs" if devices else "the processor"
        return [f"layout      {workers} {kind}, on {where} of this machine"], workers * together, min(1, len(devices))
    site = read_cluster(cluster_of(launcher))
    asked = sbatch_parameters(launcher, site, "plan")
    workers = min(-(-trials // together), launcher.slots or 1)
    sizes = [min(site.array_size, workers - start) for start in range(0, workers, site.array_size)]
    at_once = int(asked.get("array_parallelism") or workers)
    shown = ", ".join(f"--array=0-{size - 1}%{max(1, min(size, at_once // len(sizes)))}" for size in sizes[:3])
    shown += f" and {len(sizes) - 3} more" if len(sizes) > 3 else ""
    partition = asked.get("partition") or site.default_partition
    words = [f"{key} {asked[key]}" for key in ("gpus_per_node", "gres", "cpus_per_task", "mem") if key in asked]
    works = duration(working_s(asked["time"], launcher.grace_s))
    lines = [
        f"layout      {workers} {kind}: {shown}",
        f"each job    partition {partition}, {', '.join(words)}, {asked['time']} min, of which it works {works} before "
        "it makes room for the next one",
    ]
    return lines, min(workers, at_once) * together, gpu_count(asked)


def gpu_count(asked: Mapping[str, Any]) -> int:
    """GPUs of one job."""
    given = {**asked.get("additional_parameters", {}), **asked}
    for key in ("gpus_per_node", "gpus_per_task", "gpus"):
        if given.get(key) is not None:
            number = str(given[key]).rpartition(":")[2]
            return int(number) if number.isdecimal() else 1
    return parse_gres(str(given.get("gres", ""))).get("gpu", 0)


def time_words(estimate: Estimate | None, trials: int, workers: int, gpus: int, most: str = "") -> str:
    """Predicted time and GPU-hours; ``most``: a word for an estimate that is a bound."""
    if estimate is None:
        return "time        not known yet: --calibrate runs a few steps of one trial through the launcher and reckons"
    if not math.isfinite(estimate.seconds):
        raise ConfigError("a trial's time must be finite: the calibration's clock was set while it ran. Try again.")
    total_s = trials * estimate.device_s
    unit = "GPU-hours" if gpus else "hours of work"
    hours = total_s * max(1, gpus) / 3600
    wall = duration(math.ceil(trials / workers) * estimate.seconds)
    return (
        f"time        {duration(estimate.seconds)} a trial ({estimate.source}): {most}{hours:.3g} {unit} together, "
        f"about {wall} with {workers} at a time, without waiting in the queue"
    )
