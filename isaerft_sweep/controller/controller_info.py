"""Whether a controller runs a sweep, by the lock that it holds, and which one, by the file that it writes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from isaerft_sweep.journal.atomic_files import read_json, write_json
from isaerft_sweep.journal.journal import is_held
from isaerft_sweep.journal.layout import SweepFolder


@dataclass(frozen=True)
class ControllerInfo:
    """A controller: the process ``pid`` on ``host``, perhaps in the SLURM job ``job``.

    ``started``: in seconds since the epoch. ``trials``: how many its sweep has. ``overrides``: its command line's.
    """

    host: str
    pid: int
    started: float
    trials: int
    overrides: tuple[str, ...] = ()
    job: str | None = None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f", SLURM job {self.job}" if self.job else "")


@contextmanager
def write_controller_info(folder: SweepFolder, trials: int, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Record that this process runs the sweep during the block."""
    info = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time(), "trials": trials}
    folder.why_ended.unlink(missing_ok=True)
    write_json(folder.controller, {**info, "overrides": list(overrides), "job": os.environ.get("SLURM_JOB_ID")})
    yield
    # the file stays: the number of trials and the overrides are still valid


def last_controller_info(folder: SweepFolder) -> ControllerInfo | None:
    """The controller that runs the sweep, or the last one that did; None before the first."""
    info = read_json(folder.controller)
    return ControllerInfo(**{**info, "overrides": tuple(info["overrides"])}) if info else None


def controller_alive(folder: SweepFolder) -> bool:
    """Whether a controller holds the sweep's lock, on this machine or on another one that shares the folder."""
    return is_held(folder)
