"""Processes of this machine, by id and start time, so that a reused id is never taken for the old process."""

from __future__ import annotations

from pathlib import Path

import psutil


def start_time(pid: int) -> float | None:
    """When the process started, in clock ticks since the machine did; None when there is none.

    Not the time of day, which jumps when the clock is set.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    return float(stat.rpartition(")")[2].split()[19])


def is_running(pid: int, start: float | None) -> bool:
    """Whether that very process runs; a zombie does not."""
    try:
        process = psutil.Process(pid)
        return start_time(pid) in (start, None) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def descendants(pid: int) -> list[int]:
    """Ids of all processes below ``pid``."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
