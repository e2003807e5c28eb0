"""Detached sweeps: start a controller in the background, attach to a sweep, cancel it."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.controller.build import launcher_of_jobs, make_dispatcher, make_state
from isaerft_sweep.controller.controller_info import controller_alive, last_controller_info
from isaerft_sweep.controller.live_view import LiveView
from isaerft_sweep.controller.loop import SweepController
from isaerft_sweep.controller.monitor import SweepMonitor, follow
from isaerft_sweep.controller.run_controller import INTERRUPTED, closed_in_the_end, disk_errors_named
from isaerft_sweep.controller.run_sweep import run_sweep
from isaerft_sweep.controller.static_array import cancel_arrays, running_arrays
from isaerft_sweep.controller.stop_signal import AT_ONCE, IN_ORDER, ask_to_stop
from isaerft_sweep.controller.sweep_identity import sweep_folder
from isaerft_sweep.controller.trial_factory import TrialFactory
from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.append_log import whole_lines
from isaerft_sweep.journal.journal import Journal, JournalReader
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import NO_STATUS
from isaerft_sweep.paths import quoted
from isaerft_sweep.results.confirm_folder import first_sweep
from isaerft_sweep.search.sampler import FixedPoints
from isaerft_sweep.search.sweep_file import Metric, SweepDefinition
from isaerft_sweep.specs import Experiment
from isaerft_sweep.terminal import make_console

POLL_S = 0.2
ADOPT_S = 20.0
"""How long `detach` watches a controller that adopts running trials: it may dispatch nothing for hours."""
DISPATCH_S = 120.0
"""How long `detach` watches a controller for its first dispatch, which a full queue may delay."""


def detach(experiment: Experiment, overrides: Sequence[str]) -> int:
    """Start a controller in the background and wait until it runs the sweep; 0, or its exit code when it ends before."""
    folder = sweep_folder(experiment, to_definition(experiment.sweep, experiment))
    if controller_alive(folder):
        raise FolderError(
            f"the sweep in {folder.path} is already run by {last_controller_info(folder)}. isaerft-sweep attach shows it."
        )
    with disk_errors_named(folder):
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.controller_log.touch()
    _, journal_bytes = whole_lines(folder.journal)
    log_start = folder.controller_log.stat().st_size if folder.controller_log.is_file() else 0
    with folder.controller_log.open("a", encoding="utf-8") as log:
        controller = subprocess.Popen(
            [sys.executable, "-m", "isaerft_sweep.launch", *overrides],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # keeps it from this terminal's Ctrl-C and hang-up
        )
    try:
        while controller.poll() is None:
            info = last_controller_info(folder)
            if info and info.pid == controller.pid and has_begun(folder, journal_bytes, info.started):
                sweep = quoted(folder.path)
                print(f"The sweep is run by {info}.\nfollow it:  isaerft-sweep attach {sweep}")
                print(f"            isaerft-sweep status {sweep}\nend it:     isaerft-sweep cancel {sweep}")
                return 0
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        controller.terminate()
        controller.wait()
        print("Stopped: the controller has ended, and its trials with it. The same command resumes.", file=sys.stderr)
        return INTERRUPTED
    output = folder.controller_log.read_bytes()[log_start:].decode("utf-8", "replace")
    print(output, end="", file=sys.stderr if controller.returncode else sys.stdout)
    return controller.returncode


def has_begun(folder: SweepFolder, journal_bytes: int, started: float) -> bool:
    """Whether a controller can be left: it has dispatched trials, or has run for long enough without an error.

    ``journal_bytes``: the journal's size when it started. ``started``: when, in seconds since the epoch.
    """
    journal = JournalReader(folder)
    journal.update(until=journal_bytes)
    adopts = any(record.job is not None and not record.ended for record in journal.record.trials.values())
    if any(event == "dispatch" for event, _ in journal.update()):
        return True
    return time.time() - started > (ADOPT_S if adopts else DISPATCH_S)


def attach(path: Path, here: bool = False) -> int:
    """Show a sweep until it ends, or resume it when no controller runs it; an exit code as ``run_sweep``'s.

    ``here``: train on this machine without asking.
    """
    console = make_console()
    folder = SweepMonitor(path).folder
    try:
        if controller_alive(folder):
            console.print(f"The sweep is run by {last_controller_info(folder)}; Ctrl-C leaves it running.", style="dim")
        if follow(console, path):
            monitor = SweepMonitor(path)
            ended = sum(record.ended for record in monitor.records)
            console.print(f"The controller has ended, with {ended} of {monitor.trials} trials ended.")
            return 0 if ended >= monitor.trials and not any(record.given_up for record in monitor.records) else 1
    except KeyboardInterrupt:
        console.print("Left. The sweep continues.")
        return INTERRUPTED
    if first := first_sweep(folder):
        raise FolderError(
            f"{folder.path} runs the leaders of {first.path} again, and no controller runs it now. Resume it: "
            f"isaerft-sweep confirm {quoted(first.path)}, with the same --top and --seeds."
        )
    experiment, info = read_experiment(folder), last_controller_info(folder)
    if not (here or may_resume(folder, experiment)):
        console.print("Nothing was changed: no trial was started.")
        return 1
    console.print("No controller runs this sweep: resuming it.", style="dim")
    return run_sweep(experiment, info.overrides if info else ())


def may_resume(folder: SweepFolder, experiment: Experiment) -> bool:
    """Whether the user wants to resume the sweep; asks before it trains on this machine.

    Raises FolderError without a terminal to ask on, unless a controller of this machine has run the sweep before.
    """
    if folder.static_array.exists() and (jobs := running_arrays(folder.path)):
        raise FolderError(
            f"SLURM's jobs {', '.join(jobs)} run trials of {folder.path}, which no controller started. Wait for them, or "
            f"end them: isaerft-sweep cancel {quoted(folder.path)}."
        )
    monitor = SweepMonitor(folder.path)
    statuses = monitor.statuses()
    ended = [r for r in monitor.records if (r.ended and not r.given_up) or statuses.get(r.index, NO_STATUS).is_final]
    left = monitor.trials - len(ended)
    if experiment.launcher.kind != "local" or left <= 0:
        return True
    host, info = socket.gethostname(), last_controller_info(folder)
    if sys.stdin.isatty():
        print(f"{left} of {monitor.trials} trials are left, and launcher=local would train them on this machine, {host}.")
        try:
            return input("Train them here? [y/N] ").strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            print()
            return False
    if info is not None and info.host == host:
        return True
    raise FolderError(
        f"{left} of {monitor.trials} trials are left, and launcher=local would train them on this machine, {host}, where no "
        f"controller has run this sweep before. If that is right: isaerft-sweep attach --here "
        f"{quoted(folder.path)}. Else give its command with another launcher: python -m isaerft_sweep.launch "
        f"name={folder.path.name} … launcher=slurm."
    )


def cancel(path: Path, at_once: bool) -> int:
    """End a sweep's trials and jobs, and wait until none is left; 0. Finished trials stay, unfinished ones can resume.

    ``at_once``: without time for a checkpoint.
    """
    folder = SweepFolder(path.expanduser().absolute())
    if not controller_alive(folder):
        folder = SweepMonitor(path).folder
        with disk_errors_named(folder):
            ask_to_stop(folder.cancel, at_once)  # for a controller that is starting
        if folder.static_array.exists():
            cancel_arrays(folder)
        if not controller_alive(folder):
            end_jobs(read_experiment(folder), folder, at_once)
    if controller_alive(folder):
        with disk_errors_named(folder):
            wait_for_end(folder, at_once)
    monitor = SweepMonitor(path)
    under_way = sum(record.state is TrialState.QUEUED for record in monitor.records)
    if under_way:
        raise FolderError(f"{under_way} trials are still under way in {folder.path}: its controller died. Try again.")
    ended = sum(record.ended for record in monitor.records)
    print(f"Nothing of {folder.path} is left running; {ended} of {monitor.trials} trials have ended.")
    return 0


def end_jobs(experiment: Experiment, folder: SweepFolder, at_once: bool) -> None:
    """End all jobs of a sweep that no controller runs. ``at_once``: without time for a checkpoint."""
    journal = Journal(folder)
    try:
        kind, resident = launcher_of_jobs(journal) or (experiment.launcher.kind, experiment.launcher.resident)
        launcher = dataclasses.replace(experiment.launcher, kind=kind, resident=resident)
        experiment = dataclasses.replace(experiment, launcher=launcher)
        definition = SweepDefinition("given points", Metric("", "maximize"), {})
        state = make_state(journal, FixedPoints([]), TrialFactory(experiment, definition, folder, "", None), 0)
        state.restore()
        urgency = AT_ONCE if at_once else IN_ORDER
        with (
            disk_errors_named(folder),
            LiveView(make_console(), journal.record.metric, len(state.records), folder) as view,
        ):
            dispatcher = make_dispatcher(launcher, folder)
            with closed_in_the_end(dispatcher):
                SweepController(state, folder, dispatcher, launcher, view, lambda: urgency).run()
    finally:
        journal.close()


def wait_for_end(folder: SweepFolder, at_once: bool) -> None:
    """Ask the sweep's controller to stop, again if it removes the request as it starts, and wait until it has."""
    ask_to_stop(folder.cancel, at_once)
    print(f"Asked {last_controller_info(folder) or 'its controller'} to stop.", flush=True)
    while controller_alive(folder):
        if not folder.cancel.exists():
            ask_to_stop(folder.cancel, at_once)
        time.sleep(POLL_S)
    folder.cancel.unlink(missing_ok=True)


def read_experiment(folder: SweepFolder) -> Experiment:
    """The config of the sweep in ``folder``, which may have been moved. Raises FolderError when it cannot be read."""
    experiment = folder.read_config()
    sweep = experiment.sweep
    if sweep.file is not None:
        sweep = dataclasses.replace(sweep, file=str(folder.definition))
    return dataclasses.replace(experiment, sweep=sweep, output=str(folder.path.parent), name=folder.path.name)
