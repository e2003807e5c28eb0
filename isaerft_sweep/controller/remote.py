"""Leaving a sweep and coming back to it: a controller in the background, attach, cancel."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.controller.following import Follower, follow
from isaerft_sweep.controller.made import end_array
from isaerft_sweep.controller.presence import is_run, last_presence
from isaerft_sweep.controller.question import sweep_folder
from isaerft_sweep.controller.run import INTERRUPTED, end_jobs, run_sweep
from isaerft_sweep.controller.stopping import ask_to_stop
from isaerft_sweep.errors import ConfigError, FolderError
from isaerft_sweep.journal.folders import SweepFolder
from isaerft_sweep.plain import from_mapping
from isaerft_sweep.results.confirmation import first_sweep
from isaerft_sweep.specs import Experiment
from isaerft_sweep.terminal import make_console

POLL_S = 0.2
BEGUN_S = 20.0
"""How long a controller that says nothing new (all its trials run already) is watched before it is left."""


def detach(experiment: Experiment, overrides: Sequence[str]) -> int:
    """Start a controller in the background, wait until it runs the sweep, and leave it; its exit code when it fails."""
    folder = sweep_folder(experiment, to_definition(experiment.sweep, experiment))
    if is_run(folder):
        raise FolderError(
            f"the sweep in {folder.path} is already run by {last_presence(folder)}. isaerft-sweep attach shows it."
        )
    folder.path.mkdir(parents=True, exist_ok=True)
    already = folder.journal.stat().st_size if folder.journal.is_file() else 0
    begin = folder.controller_log.stat().st_size if folder.controller_log.is_file() else 0
    with folder.controller_log.open("a", encoding="utf-8") as log:
        controller = subprocess.Popen(
            [sys.executable, "-m", "isaerft_sweep.launch", *overrides],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # out of reach of this terminal's Ctrl-C and of its end
        )
    try:
        while controller.poll() is None:
            known = last_presence(folder)
            if (
                known
                and known.pid == controller.pid
                and (folder.journal.stat().st_size > already or time.time() - known.started > BEGUN_S)
            ):
                print(f"The sweep is run by {known}.\nfollow it:  isaerft-sweep attach {folder.path}")
                print(f"            isaerft-sweep status {folder.path}\nend it:     isaerft-sweep cancel {folder.path}")
                return 0
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        controller.terminate()
        controller.wait()
        print("Stopped: the controller has ended, and its trials with it. The same command goes on.", file=sys.stderr)
        return INTERRUPTED
    said = folder.controller_log.read_bytes()[begin:].decode("utf-8", "replace")
    print(said, end="", file=sys.stderr if controller.returncode else sys.stdout)
    return controller.returncode


def attach(path: Path) -> int:
    """Show a sweep until it ends, or go on with it when no controller runs it; an exit code as ``run_sweep``'s."""
    console = make_console()
    folder = Follower(path).folder
    try:
        if is_run(folder):
            console.print(f"The sweep is run by {last_presence(folder)}; Ctrl-C leaves it running.", style="dim")
        if follow(console, path):
            seen = Follower(path)
            ended = sum(record.ended for record in seen.records)
            console.print(f"The controller has ended, with {ended} of {seen.trials} trials ended.")
            return 0 if ended >= seen.trials else 1
    except KeyboardInterrupt:
        console.print("Left. The sweep goes on.")
        return INTERRUPTED
    if first := first_sweep(folder):
        raise FolderError(
            f"{folder.path} runs the leaders of {first.path} again, and no controller runs it now. Go on with it: "
            f"isaerft-sweep confirm {first.path}, with the --top and --seeds of before."
        )
    console.print("No controller runs this sweep: going on with it.", style="dim")
    known = last_presence(folder)
    return run_sweep(read_experiment(folder), known.overrides if known else ())


def cancel(path: Path, at_once: bool) -> int:
    """End a sweep's trials and jobs, in order or at once, and wait until nothing is left; 0.

    Finished trials stay, unfinished ones can be gone on with.
    """
    folder = Follower(path).folder
    if not is_run(folder):
        if folder.made.exists():
            end_array(folder)
        end_jobs(read_experiment(folder), folder, at_once)
    else:
        ask_to_stop(folder.cancel, at_once)
        print(f"Asked {last_presence(folder)} to stop.", flush=True)
        while is_run(folder):
            time.sleep(POLL_S)
    seen = Follower(path)
    under_way = sum(record.state == "queued" for record in seen.records)
    if under_way:
        raise FolderError(f"{under_way} trials are still under way in {folder.path}: its controller died. Try again.")
    print(
        f"Nothing of {folder.path} is left running; {sum(r.ended for r in seen.records)} of {seen.trials} trials have ended."
    )
    return 0


def read_experiment(folder: SweepFolder) -> Experiment:
    """What the sweep in ``folder`` was started with, wherever it lies now. Raises FolderError when it cannot be read."""
    if not folder.config.is_file():
        raise FolderError(
            f"{folder.path} must have a config.yaml, but its sweep ended before any trial began (a check that failed, or "
            "Ctrl-C). Give the sweep's command again."
        )
    try:
        raw = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
        experiment: Experiment = from_mapping(Experiment, raw, "")
    except (OSError, yaml.YAMLError, ConfigError, TypeError, AttributeError) as error:
        raise FolderError(f"{folder.config} must hold the sweep's config but cannot be read: {error}.") from error
    sweep = experiment.sweep
    if sweep.file is not None:
        sweep = dataclasses.replace(sweep, file=str(folder.definition))
    return dataclasses.replace(experiment, sweep=sweep, output=str(folder.path.parent), name=folder.path.name)
