"""Processes of this machine, by id and start time: ids are reused."""

from __future__ import annotations

from pathlib import Path

import psutil


def start_time(pid: int) -> float | None:
    """When the process started, in clock ticks since boot; None when it does not exist.

    The time of day would jump when the clock is set.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    return float(stat.rpartition(")")[2].split()[19])


def is_running(pid: int, start: float | None) -> bool:
    """Whether the process with this id and start time runs; a zombie does not."""
    try:
        process = psutil.Process(pid)
        return start_time(pid) in (start, None) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def descendants(pid: int) -> list[int]:
    """Ids of all descendants of ``pid``."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
