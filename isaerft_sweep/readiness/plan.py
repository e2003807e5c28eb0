"""``isaerft-sweep plan``: previews a sweep without submitting it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.controller.build import count_trials, make_sampler
from isaerft_sweep.controller.introduction import introduction
from isaerft_sweep.controller.live_view import duration
from isaerft_sweep.controller.preflight import known_trial_needs
from isaerft_sweep.controller.prior import prior_results
from isaerft_sweep.controller.sweep_identity import sweep_folder
from isaerft_sweep.dispatch.local import visible_gpus
from isaerft_sweep.dispatch.slurm.cluster import cluster_of, parse_gres, read_cluster
from isaerft_sweep.dispatch.slurm.sbatch_flags import sbatch_parameters, working_s
from isaerft_sweep.errors import ConfigError
from isaerft_sweep.readiness.calibrate import Estimate, calibrate, from_earlier_sweeps
from isaerft_sweep.results.axes import LOG_FAMILIES
from isaerft_sweep.search.distributions import Categorical, Conditional, Constant, Distribution, Numeric
from isaerft_sweep.search.sampler import Point
from isaerft_sweep.specs import Experiment, total_steps

WIDTH = 32
"""Width of a parameter's axis in characters."""


def plan(console: Console, experiment: Experiment, calibrating: bool) -> None:
    """Print trials, space, time and layout; submits only a calibration. Raises IsaerftError as the sweep would."""
    definition = to_definition(experiment.sweep, experiment)
    folder = sweep_folder(experiment, definition)
    sampler = make_sampler(experiment, definition, prior_results(None, experiment, definition), folder)
    trials = count_trials(definition, sampler, 0)
    console.print(introduction(folder, experiment, definition, sampler, trials, 0), soft_wrap=True, highlight=False)
    known = int(min(trials, sampler.foreseeable))
    points = [point for point in (sampler.ask() for _ in range(min(known, 1000))) if point is not None]
    console.print(space_table(definition.parameters, points))
    if known < trials:
        console.print(f"The first {known} trials are fixed; the {trials - known} after them depend on results.", style="dim")
    lines, workers, gpus = layout(experiment, trials)
    console.print("\n".join(lines), soft_wrap=True, highlight=False)
    estimate = from_earlier_sweeps(experiment, list(definition.parameters))
    if calibrating:
        steps = total_steps(experiment.orpo, int(known_trial_needs(experiment)["pairs"]))
        estimate = calibrate(experiment, definition, points[0], steps)
    bound = "at most " if definition.early_terminate or (calibrating and experiment.launcher.trials_per_pass != 1) else ""
    console.print(time_text(estimate, trials, workers, gpus, bound), soft_wrap=True, highlight=False)


def space_table(space: Mapping[str, Distribution], points: Sequence[Point]) -> Table:
    """One row per parameter: the distribution of trials on its scale, or the count of each value."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("parameter", "scale", "from", "trials on that scale", "to"):
        table.add_column(name, no_wrap=name != "trials on that scale")
    for key, d, name, chosen in _rows(space, points):
        if isinstance(d, Constant):
            table.add_row(name, "constant", show(d.value), "", "")
        elif isinstance(d, Categorical):
            counts = Counter(show(point.params[key]) for point in chosen)
            table.add_row(
                name, f"{len(d.values)} values", "", ", ".join(f"{show(v)}: {counts[show(v)]}" for v in d.values), ""
            )
        else:
            positions = [point.unit[key] for point in chosen if key in point.unit]
            kind = "log" if d.family in LOG_FAMILIES else d.family
            table.add_row(name, kind, show(d.at(0.0)), axis(positions), show(d.at(1.0)))
    return table


def _rows(
    space: Mapping[str, Distribution], points: Sequence[Point]
) -> Iterator[tuple[str, Constant | Categorical | Numeric, str, list[Point]]]:
    """Key, distribution, shown name and points of each row; a conditional parameter has a row for each case."""
    for key, d in space.items():
        name = key.partition(".")[2]
        if not isinstance(d, Conditional):
            yield key, d, name, list(points)
            continue
        for value, case in d.cases:
            yield key, case, f"{name} ({show(value)})", [p for p in points if p.params[d.parent] == value]


def show(value: object) -> str:
    """A value with three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def axis(positions: Sequence[float]) -> str:
    """A histogram of positions in the unit interval: ``·`` none, ``1`` to ``9``, ``+`` more."""
    counts = [0] * WIDTH
    for position in positions:
        counts[min(WIDTH - 1, int(position * WIDTH))] += 1
    return "".join("·" if count == 0 else str(count) if count < 10 else "+" for count in counts)


def layout(experiment: Experiment, trials: int) -> tuple[list[str], int, int]:
    """Lines that describe the jobs; the number of trials that run at once; GPUs per job."""
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
    requested = sbatch_parameters(launcher, site, "plan")
    workers = min(-(-trials // together), launcher.slots or 1)
    sizes = [min(site.array_size, workers - start) for start in range(0, workers, site.array_size)]
    at_once = int(requested.get("array_parallelism") or workers)
    array_flags = ", ".join(f"--array=0-{size - 1}%{max(1, min(size, at_once // len(sizes)))}" for size in sizes[:3])
    array_flags += f" and {len(sizes) - 3} more" if len(sizes) > 3 else ""
    partition = requested.get("partition") or site.default_partition
    resources = [f"{key} {requested[key]}" for key in ("gpus_per_node", "gres", "cpus_per_task", "mem") if key in requested]
    working_time = duration(working_s(requested["time"], launcher.grace_s))
    lines = [
        f"layout      {workers} {kind}: {array_flags}",
        f"each job    partition {partition}, {', '.join(resources)}, {requested['time']} min, of which it trains for "
        f"{working_time} before the next job takes over",
    ]
    return lines, min(workers, at_once) * together, gpu_count(requested)


def gpu_count(requested: Mapping[str, Any]) -> int:
    """GPUs of one job, from its sbatch parameters."""
    parameters = {**requested.get("additional_parameters", {}), **requested}
    for key in ("gpus_per_node", "gpus_per_task", "gpus"):
        if parameters.get(key) is not None:
            number = str(parameters[key]).rpartition(":")[2]
            return int(number) if number.isdecimal() else 1
    return parse_gres(str(parameters.get("gres", ""))).get("gpu", 0)


def time_text(estimate: Estimate | None, trials: int, workers: int, gpus: int, prefix: str = "") -> str:
    """Predicted time and GPU-hours as text.

    Args:
        estimate: of one trial; None: unknown.
        trials: how many.
        workers: trials that run at once.
        gpus: per job; 0: on the CPU.
        prefix: of an estimate that is an upper bound.
    """
    if estimate is None:
        return "time        not known yet: --calibrate runs a few steps of one trial through the launcher to estimate it"
    if not math.isfinite(estimate.seconds):
        raise ConfigError("a trial's time must be finite: the calibration's clock was set while it ran. Try again.")
    total_s = trials * estimate.device_s
    unit = "GPU-hours" if gpus else "hours of work"
    hours = total_s * max(1, gpus) / 3600
    wall = duration(math.ceil(trials / workers) * estimate.seconds)
    return (
        f"time        {duration(estimate.seconds)} a trial ({estimate.source}): {prefix}{hours:.3g} {unit} together, "
        f"about {wall} with {workers} at a time, without waiting in the queue"
    )
