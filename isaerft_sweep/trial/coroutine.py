"""Trials that advance together: each runs as if alone until it wants to go through the model; then all go at once.

A trial is a greenlet in its seat: TRL's trainer, the recorder and everything else are the code of a trial alone. Its
forward pass is handed to the pack, which waits until every trial wants one; likewise the backward pass. Trials sit down and
get up between passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from greenlet import getcurrent, greenlet
from transformers import PreTrainedModel

from isaerft_sweep.trial.batch_layout import Batch
from isaerft_sweep.trial.multi_trial import MultiTrialModel, TrialBatch, measure_trials_per_pass, set_gradients_aside
from isaerft_sweep.trial.process_state import ProcessState
from isaerft_sweep.trial.strategy import ForwardStrategy

Numbers = tuple[torch.Tensor, torch.Tensor]


class TrialCoroutine(ForwardStrategy):
    """One trial of a pack. ``run`` is the whole trial; it is given the seat, for its trainer's ``passes``."""

    base: PreTrainedModel | None = None
    """The model without any adapter, which all trials of the pack share."""
    own = ForwardStrategy()
    """How the trial goes through the model when nobody goes with it."""

    def __init__(self, run: Callable[[TrialCoroutine], bool]) -> None:
        super().__init__()
        self._greenlet = greenlet(lambda: run(self))
        self._state = ProcessState.now()
        self._answer: Numbers | Exception | None = None
        self.wanted: TrialBatch | None = None
        """The forward pass that the trial waits for; None: the backward pass of the last one."""
        self.last: TrialBatch | None = None
        """The last forward pass that it waited for."""
        self.trains = False
        self.numbers: torch.Tensor | None = None
        """Log-probabilities of the last forward pass, with the graph that leads to the trial's parameters."""
        self.read: torch.Tensor | None = None
        """The same numbers as the trial got them; its loss leaves its gradient there."""

    def resume(self) -> bool | None:
        """Run the trial until it waits for a pass; what ``run`` returned when it is over, else None."""
        outer = ProcessState.now()
        self._state.put()
        try:
            ended = self._greenlet.switch()
        finally:
            self._state = ProcessState.now()
            outer.put()
        return bool(ended) if self._greenlet.dead else None

    def forward(self, model: PreTrainedModel, batch: Batch) -> Numbers:
        self.wanted = self.last = TrialBatch(model, batch, self.own)
        self.trains = torch.is_grad_enabled()
        self._wait()
        answer, self._answer = self._answer, None
        if isinstance(answer, Exception):
            raise answer
        assert answer is not None
        return answer

    def backward(self) -> None:
        self.wanted = None
        self._wait()
        if isinstance(self._answer, Exception):
            raise self._answer

    def answer(self, logps: torch.Tensor, means: torch.Tensor) -> None:
        """Hand the trial its numbers, cut off from the graph."""
        self.numbers = logps if self.trains else None
        self.read = logps.detach().requires_grad_(self.trains)
        self._answer = self.read, means.detach()

    def fail(self, error: Exception) -> None:
        """Let the pass fail where the trial asked for it."""
        self._answer = error

    def _wait(self) -> None:
        parent = getcurrent().parent
        assert parent is not None
        parent.switch()


def run_passes(joint: MultiTrialModel, seats: Sequence[TrialCoroutine]) -> None:
    """Give every seat the pass that it waits for."""
    training = [seat for seat in seats if seat.wanted is not None and seat.trains]
    evaluating = [seat for seat in seats if seat.wanted is not None and not seat.trains]
    _backward(joint, [seat for seat in seats if seat.wanted is None])
    _forward(joint, training)
    with torch.no_grad():
        _forward(joint, evaluating)


def _forward(joint: MultiTrialModel, seats: Sequence[TrialCoroutine]) -> None:
    """One pass for all; in halves where it does not fit into the device's memory, and an error to whom it belongs."""
    if not seats:
        return
    found = None
    try:
        found = joint.forward([seat.wanted for seat in seats if seat.wanted is not None])
    except Exception as error:
        if len(seats) == 1:
            seats[0].fail(error.with_traceback(None))  # which would keep the failed pass in memory
            return
        _say_why(error, len(seats))
    if found is None:  # out here the error is gone, and with it all that the failed pass held
        torch.cuda.empty_cache()
        _forward(joint, seats[: len(seats) // 2])
        _forward(joint, seats[len(seats) // 2 :])
        return
    for seat, (logps, means) in zip(seats, found, strict=True):
        seat.answer(logps, means)


def _backward(joint: MultiTrialModel, seats: Sequence[TrialCoroutine], again: bool = False) -> None:
    """One backward pass for all, or in halves as above: ``again``, since a failed pass has used up the forward one."""
    if not seats:
        return
    models = [seat.last.model for seat in seats if seat.last is not None] if len(seats) > 1 else []
    before = [pair for model in models for pair in set_gradients_aside(model)]
    done = _went_back(joint, seats, again)
    for parameter, gradient in before:
        _put_back(parameter, gradient, keep=done)
    if not done and len(seats) > 1:
        torch.cuda.empty_cache()
        _backward(joint, seats[: len(seats) // 2], again=True)
        _backward(joint, seats[len(seats) // 2 :], again=True)


def _went_back(joint: MultiTrialModel, seats: Sequence[TrialCoroutine], again: bool) -> bool:
    """Whether the pass went well; nothing holds what is left of it afterwards. One trial alone is told of its error."""
    try:
        if again:
            found = joint.forward([seat.last for seat in seats if seat.last is not None])
            for seat, (logps, _) in zip(seats, found, strict=True):
                seat.numbers = logps
        pairs = [(seat.numbers, seat.read.grad) for seat in seats if seat.numbers is not None and seat.read is not None]
        torch.autograd.backward([numbers for numbers, _ in pairs], [gradient for _, gradient in pairs])
        return True
    except Exception as error:
        if len(seats) == 1:
            seats[0].fail(error.with_traceback(None))
        else:
            _say_why(error, len(seats))
        return False
    finally:
        for seat in seats:
            seat.numbers = None


def _put_back(parameter: torch.nn.Parameter, before: torch.Tensor | None, keep: bool) -> None:
    """Give a parameter its earlier gradient back, with the new one added to it if that is to ``keep``."""
    new = parameter.grad if keep else None
    if before is not None and new is not None:
        new = before.add_(new)  # as autograd does
    parameter.grad = before if new is None else new


def _say_why(error: Exception, trials: int) -> None:
    if not isinstance(error, torch.cuda.OutOfMemoryError):
        print(f"a pass of {trials} trials failed ({error}); run in halves", flush=True)


def best_trials_per_pass(joint: MultiTrialModel, seat: TrialCoroutine) -> int:
    """How many trials pay on this device, measured with the batch that the seat waits for."""
    assert seat.wanted is not None
    best, seconds, failed = measure_trials_per_pass(joint, seat.wanted)
    words = ", ".join(f"{number}: {each:.3f}" for number, each in seconds.items())
    more = f"; a pass of {failed[0]} failed: {failed[1]}" if failed else ""
    print(f"{best} trials at a time pay here (seconds per trial and step by number of trials: {words}{more})", flush=True)
    return best
