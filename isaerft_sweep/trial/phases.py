"""What a trial does at the moment, for people who wait for it; before its first step a request to stop ends it at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status_writer import StatusWriter
from isaerft_sweep.trial.stop_request import StopFlags, at_once

LOADING, ADAPTER, READING = "loading the model", "loading the SAE", "reading the data"
FROZEN, TRAINING, EVALUATING, SAVING = "frozen layers", "training", "evaluating", "saving"
REFERENCE, LATENTS = "measuring the base model", "measuring the latents"

T = TypeVar("T")


class Phases:
    """Writes the phase of one attempt into the trial's status. ``flags``: what ``stop_requests`` gave."""

    def __init__(self, status: StatusWriter, flags: StopFlags) -> None:
        self.status, self.flags = status, flags
        self.now = ""

    def enter(self, phase: str) -> None:
        self.now = phase
        self.status.write(TrialState.RUNNING, phase=phase)

    def tell(self, share: float) -> None:
        """How much of the phase is done."""
        self.status.write(TrialState.RUNNING, phase=f"{self.now} {100 * share:.0f} %", force=False)

    def prepared(self, phase: str, make: Callable[[], T]) -> T:
        """What ``make`` gives. Raises StopRequested as soon as a stop is requested."""
        self.enter(phase)
        with at_once(self.flags, self.status.folder):
            return make()
