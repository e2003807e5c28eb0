"""What a person sees while a sweep runs."""

from __future__ import annotations

import io
import time
from typing import Any

from rich.console import Console

from isaerft_sweep.controller.progress import SHOWN_ROWS, Progress
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.search.sampler import Point


def record(index: int, state: str, **facts: Any) -> TrialRecord:
    point = Point({"orpo.learning_rate": 0.001 * (index + 1), "orpo.beta": 0.1})
    return TrialRecord(index, f"run-{index}", f"r{index}", point, state=state, **facts)


def drawn(records: list[TrialRecord], statuses: dict[int, dict[str, Any]]) -> str:
    """The live table, as a terminal gets it."""
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=120, height=60, color_system=None)
    with Progress(console, "eval/log_odds_chosen", 50) as view:
        view.update(records, statuses)
    return terminal.getvalue()


def test_the_table_tells_state_point_step_loss_metric_and_time_left() -> None:
    running = {"state": "running", "step": 10, "max_steps": 40, "loss": 1.25, "metric": 0.5, "started": time.time() - 100}
    text = drawn([record(0, "completed", metric=0.75, seconds=60.0), record(1, "queued")], {1: running})
    heads = ("#", "state", "lr", "beta", "step", "loss", "log odds", "time left")
    assert all(head in text for head in heads), text
    row = next(line for line in text.splitlines() if "running" in line)
    assert row.split() == ["2", "running", "2.0e-03", "0.1", "10/40", "1.2500", "0.5000", "5", "min"], row
    assert "1 of 50 trials ended" in text and "left" in text


def test_what_is_under_way_is_always_shown() -> None:
    """A revived trial, or an early one that takes long, among many later ones."""
    records = [record(i, "queued" if i in (0, 3) else "completed", metric=0.1) for i in range(60)]
    text = drawn(records, {0: {"state": "running"}, 3: {"state": "running"}})
    numbers = [int(line.split()[0]) for line in text.splitlines() if line.split() and line.split()[0].isdecimal()]
    shown = numbers[: numbers.index(60) + 1]
    assert shown[:2] == [1, 4] and len(shown) == SHOWN_ROWS and shown[2:] == list(range(33, 61))
