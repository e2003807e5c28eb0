"""When a sweep has done enough: the winner is sure, another trial promises little, or the device time is spent."""

from __future__ import annotations

from collections.abc import Callable

from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.results.statistics import show_probability
from isaerft_sweep.search.sampler import PointSource
from isaerft_sweep.specs import SweepSpec

LEAST_COMPLETED = 5
"""Trials that must have completed before a sweep can have done enough by its results."""


class StopRule:
    """Says why no further trial is to start. It looks again only after a trial has ended."""

    def __init__(self, sweep: SweepSpec, journal: Journal, sampler: PointSource) -> None:
        self.spec, self.emulates, self.journal, self.sampler = sweep.stop, sweep.emulate, journal, sampler
        self._seen = -1
        self._reason = ""

    def __call__(self) -> str:
        """The reason, with its numbers; empty while the sweep goes on."""
        ended = sum(record.ended for record in self.journal.record.trials.values())
        if ended != self._seen and not self._reason:
            self._seen, self._reason = ended, self._look()
        return self._reason

    def _look(self) -> str:
        records = self.journal.record.trials.values()
        hours = sum(record.seconds for record in records) / 3600
        if self.spec.device_hours is not None and hours >= self.spec.device_hours:
            return f"{hours:.3g} device-hours are spent (sweep.stop.device_hours={self.spec.device_hours:g})"
        completed = sum(record.metric is not None for record in records)
        if (completed >= LEAST_COMPLETED or self.emulates) and (reason := self._by_gain()):
            return reason
        return self._by_probability() if completed >= LEAST_COMPLETED else ""

    def _by_gain(self) -> str:
        own = self.spec.expected_gain
        gain = self.sampler.expected_gain() if own is not None or self.emulates else None
        if gain is None:
            return ""
        bound = gain.negligible if own is None else own
        if bound is None or gain.value >= bound:
            return ""
        why = "a hundredth of the emulated range" if own is None else f"sweep.stop.expected_gain={own:g}"
        return f"another trial is expected to gain {gain.value:.2g}, less than {bound:.2g} ({why})"

    def _by_probability(self) -> str:
        bound = self.spec.probability_best
        if bound is None:
            return ""
        try:
            winner = read_sweep_folder(self.journal.folder.path).winner
        except FolderError:
            return ""
        chance = winner.probability_best if winner else None
        if winner is None or chance is None or chance < bound:
            return ""
        return (
            f"trial {winner.record.index + 1} is the best with a probability of {show_probability(chance)} "
            f"(sweep.stop.probability_best={bound:g})"
        )


def make_stop_rule(sweep: SweepSpec, journal: Journal, sampler: PointSource) -> Callable[[], str]:
    """The rule; one that never stops where nothing is set."""
    spec = sweep.stop
    is_set = any(bound is not None for bound in (spec.probability_best, spec.expected_gain, spec.device_hours))
    return StopRule(sweep, journal, sampler) if is_set or sweep.emulate else lambda: ""
