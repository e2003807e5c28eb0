"""Runs trials pass by pass: one by itself, or the passes of several trials at once.

Each trial is a generator that runs until it needs a pass (``passes.py``). When every trial needs one, their forward passes
run as one, and their backward passes as one. Trials join and leave between passes. The loss of a trial writes its gradient
into detached log-probabilities, so a backward pass starts from there and never enters another trial's loss.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TextIO, TypeVar

import torch

from isaerft_sweep.trial.batch_layout import TokenLogps
from isaerft_sweep.trial.multi_trial import MultiTrialModel, measure_trials_per_pass, set_gradients_aside
from isaerft_sweep.trial.passes import ForwardPass, Steps

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessState:
    """What a process has once although each of its trials needs its own: output streams and torch's random numbers."""

    streams: tuple[TextIO, TextIO]
    random: torch.Tensor
    cuda: list[torch.Tensor]

    @classmethod
    def now(cls) -> ProcessState:
        """The present state, copied."""
        # only where CUDA is in use already: asking would start it
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls((sys.stdout, sys.stderr), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Make this the process's state."""
        sys.stdout, sys.stderr = self.streams
        torch.set_rng_state(self.random)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


class RunningTrial(Generic[T]):
    """A trial that has begun, with the pass that it waits for. ``advance`` starts it."""

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps
        self._state = ProcessState.now()
        self._answer: TokenLogps | Exception | None = None
        self.forward: ForwardPass | None = None
        """The last forward pass that it asked for."""
        self.wants_forward = False
        """Whether it waits for that, or for its backward pass."""
        self.result: T | None = None
        self.ended = False
        self._graph: TokenLogps | None = None
        """The numbers of the last forward pass, with the graph that leads to the trial's parameters."""
        self._detached: TokenLogps | None = None
        """The same numbers as the trial got them; its loss leaves its gradient there."""

    @property
    def joinable(self) -> bool:
        """Whether other trials may share its next forward pass."""
        return self.forward is not None and self.forward.strategy.base is not None

    @property
    def trains(self) -> bool:
        return self.forward is not None and self.forward.trains

    def advance(self) -> None:
        """Run the trial until it needs a pass, or to its end."""
        outer = ProcessState.now()
        self._state.restore()
        answer, self._answer = self._answer, None
        try:
            request = self._steps.throw(answer) if isinstance(answer, Exception) else self._steps.send(answer)
        except StopIteration as end:
            self.result, self.ended = end.value, True
            return
        finally:
            self._state = ProcessState.now()
            outer.restore()
        self.wants_forward = isinstance(request, ForwardPass)
        if isinstance(request, ForwardPass):
            self.forward = request

    def answer(self, numbers: TokenLogps) -> None:
        """Hand the trial its numbers, cut off from the graph."""
        self._graph = numbers if self.trains else None
        self._answer = self._detached = numbers.detached(self.trains)

    def fail(self, error: Exception) -> None:
        """Let the pass fail where the trial asked for it."""
        # the traceback would keep the failed pass in memory
        self._answer = error.with_traceback(None)

    def recomputed(self, numbers: TokenLogps) -> None:
        """The last forward pass once more: a failed backward pass has used up its graph."""
        self._graph = numbers

    def outputs_and_gradients(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Where the backward pass starts: the forward pass's outputs, and the gradients that the trial's loss left."""
        assert self._graph is not None and self._detached is not None
        leaves = zip(self._graph.differentiable(), self._detached.differentiable(), strict=True)
        pairs = [(output, leaf.grad) for output, leaf in leaves if leaf.grad is not None]
        return [output for output, _ in pairs], [gradient for _, gradient in pairs]

    def free_graph(self) -> None:
        self._graph = None


def run_alone(steps: Steps[T]) -> T:
    """Run one trial to its end."""
    trial = RunningTrial(steps)
    trial.advance()
    while not trial.ended:
        run_passes(None, [trial])
        trial.advance()
    return trial.result  # type: ignore[return-value]  # it has ended


def run_passes(joint: MultiTrialModel | None, trials: Sequence[RunningTrial[Any]]) -> None:
    """Give every trial the pass that it waits for. ``joint``: for passes of several trials; None: each runs by itself."""
    groups = [[trial for trial in trials if trial.joinable], *([trial] for trial in trials if not trial.joinable)]
    for group in groups:
        together = joint if len(group) > 1 else None
        _backward(together, [trial for trial in group if not trial.wants_forward])
        for trains in (True, False):
            with torch.set_grad_enabled(trains):
                _forward(together, [trial for trial in group if trial.wants_forward and trial.trains == trains])


def _forward(joint: MultiTrialModel | None, trials: Sequence[RunningTrial[Any]]) -> None:
    """One pass for all; in halves where it does not fit into the device's memory. The error of a single trial goes to it."""
    if not trials:
        return
    numbers = None
    try:
        numbers = _run(joint, trials)
    except Exception as error:
        if len(trials) == 1:
            trials[0].fail(error)
            return
        _say_why(error, len(trials))
    if numbers is None:  # out here the error is gone, and with it all that the failed pass held
        torch.cuda.empty_cache()
        _forward(joint, trials[: len(trials) // 2])
        _forward(joint, trials[len(trials) // 2 :])
        return
    for trial, its in zip(trials, numbers, strict=True):
        trial.answer(its)


def _run(joint: MultiTrialModel | None, trials: Sequence[RunningTrial[Any]]) -> list[TokenLogps]:
    """The last forward pass of each."""
    passes = [trial.forward for trial in trials if trial.forward is not None]
    return joint.forward(passes) if joint is not None else [one.run() for one in passes]


def _backward(joint: MultiTrialModel | None, trials: Sequence[RunningTrial[Any]], again: bool = False) -> None:
    """One backward pass for all, or in halves as above: ``again``, since a failed pass has used up the forward one."""
    if not trials:
        return
    models = [trial.forward.model for trial in trials if trial.forward is not None] if len(trials) > 1 else []
    before = [pair for model in models for pair in set_gradients_aside(model)]
    done = _went_back(joint, trials, again)
    for parameter, gradient in before:
        _put_back(parameter, gradient, keep=done)
    if not done and len(trials) > 1:
        torch.cuda.empty_cache()
        _backward(joint, trials[: len(trials) // 2], again=True)
        _backward(joint, trials[len(trials) // 2 :], again=True)


def _went_back(joint: MultiTrialModel | None, trials: Sequence[RunningTrial[Any]], again: bool) -> bool:
    """Whether the pass succeeded; nothing holds what is left of it afterwards. The error of a single trial goes to it."""
    try:
        if again:
            for trial, numbers in zip(trials, _run(joint, trials), strict=True):
                trial.recomputed(numbers)
        starts = [trial.outputs_and_gradients() for trial in trials]
        torch.autograd.backward([t for outputs, _ in starts for t in outputs], [g for _, grads in starts for g in grads])
        return True
    except Exception as error:
        if len(trials) == 1:
            trials[0].fail(error)
        else:
            _say_why(error, len(trials))
        return False
    finally:
        for trial in trials:
            trial.free_graph()


def _put_back(parameter: torch.nn.Parameter, before: torch.Tensor | None, keep: bool) -> None:
    """Give a parameter its earlier gradient back, with the new one added to it if that is to ``keep``."""
    new = parameter.grad if keep else None
    if before is not None and new is not None:
        new = before.add_(new)  # as autograd does
    parameter.grad = before if new is None else new


def _say_why(error: Exception, trials: int) -> None:
    if not isinstance(error, torch.cuda.OutOfMemoryError):
        print(f"a pass of {trials} trials failed ({error}); run in halves", flush=True)


def best_trials_per_pass(joint: MultiTrialModel, forward: ForwardPass) -> int:
    """How many trials pay on this device, measured with one trial's batch."""
    best, seconds, failed = measure_trials_per_pass(joint, forward)
    times = ", ".join(f"{number}: {each:.3f}" for number, each in seconds.items())
    more = f"; a pass of {failed[0]} failed: {failed[1]}" if failed else ""
    print(f"{best} trials at a time pay here (seconds per trial and step by number of trials: {times}{more})", flush=True)
    return best
