"""Processes of this machine, by id and start time, so that a reused id is never taken for the old process."""

from __future__ import annotations

import psutil


def start_time(pid: int) -> float | None:
    """When the process started, seconds since the epoch; None when there is none."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


def is_running(pid: int, start: float | None) -> bool:
    """Whether that very process runs; a zombie does not."""
    try:
        process = psutil.Process(pid)
        same = start is None or abs(process.create_time() - start) < 0.02
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def descendants(pid: int) -> list[int]:
    """Ids of all processes below ``pid``."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
