"""Runs trials pass by pass: one trial alone, or co-batched trials whose passes run together.

Each trial is a generator that runs until it needs a pass (``passes.py``). When every trial waits for one, one forward pass
runs for all that need it, and one backward pass likewise. Trials join and leave between passes. Each trial's loss writes its
gradient into the detached log-probs; the backward pass starts there and never enters another trial's loss.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TextIO, TypeVar

import torch

from isaerft_sweep.trial.cobatch.multi_trial import MultiTrialModel, measure_trials_per_pass, set_gradients_aside
from isaerft_sweep.trial.cobatch.passes import BackwardPass, ForwardPass, Steps
from isaerft_sweep.trial.forward.batch_layout import TokenLogps
from isaerft_sweep.trial.random_state import RandomState

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessState:
    """Process-wide state that each trial needs separately: output streams and torch's random state."""

    streams: tuple[TextIO, TextIO]
    random: RandomState

    @classmethod
    def now(cls) -> ProcessState:
        """A copy of the current state."""
        return cls((sys.stdout, sys.stderr), RandomState.now())

    def restore(self) -> None:
        """Make this the process's state."""
        sys.stdout, sys.stderr = self.streams
        self.random.restore()


class RunningTrial(Generic[T]):
    """A trial and the pass that it waits for. The first ``advance`` starts it."""

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps
        self._state = ProcessState.now()
        self._answer: TokenLogps | Exception | None = None
        self.forward: ForwardPass | None = None
        """The last forward pass that the trial requested."""
        self.wants_forward = False
        """True while the trial waits for a forward pass, False for a backward pass."""
        self.keeps_graph = False
        """Whether another backward pass follows the one that it waits for."""
        self.held = False
        """Whether its pass was put off."""
        self.result: T | None = None
        self.ended = False
        self._graph: TokenLogps | None = None
        """Outputs of the last forward pass, with the autograd graph to the trial's parameters."""
        self._detached: TokenLogps | None = None
        """The same values, detached, as the trial received them; its loss writes its gradient here."""

    @property
    def joinable(self) -> bool:
        """Whether other trials may share its next forward pass."""
        return self.forward is not None and self.forward.strategy.base is not None

    @property
    def trains(self) -> bool:
        return self.forward is not None and self.forward.trains

    def advance(self) -> None:
        """Run the trial until it needs a pass or ends. One that is held still waits for its pass."""
        if self.held:
            self.held = False
            return
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
        self.keeps_graph = isinstance(request, BackwardPass) and request.again
        if isinstance(request, ForwardPass):
            self.forward = request

    def hold(self) -> None:
        """Put its pass off, so that it runs together with those of others."""
        self.held = True

    def answer(self, outputs: TokenLogps) -> None:
        """Give the trial the outputs of its forward pass, detached."""
        self._graph = outputs if self.trains else None
        self._answer = self._detached = outputs.detached(self.trains)

    def fail(self, error: Exception) -> None:
        """Raise the error of a failed pass inside the trial."""
        # the traceback would keep the tensors of the failed pass in memory
        self._answer = error.with_traceback(None)

    def recomputed(self, outputs: TokenLogps) -> None:
        """Replace the graph after a failed backward pass, which has freed the old one."""
        self._graph = outputs

    def outputs_and_gradients(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Where the backward pass starts: the forward pass's outputs, and the gradients of the trial's loss for them."""
        assert self._graph is not None and self._detached is not None
        leaves = zip(self._graph.differentiable(), self._detached.differentiable(), strict=True)
        pairs = [(output, leaf.grad) for output, leaf in leaves if leaf.grad is not None and output.requires_grad]
        return [output for output, _ in pairs], [gradient for _, gradient in pairs]

    def free_graph(self) -> None:
        """Free the graph, unless another backward pass follows."""
        if not self.keeps_graph:
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
    """Run the pass that each trial waits for. ``joint``: the model for co-batched trials; None: each trial runs alone.

    A training forward pass is held while other trials wait for a backward pass: they want the next forward pass too, and
    then all of them go together. Without that, trials that evaluate a different number of times stay out of step.
    """
    groups = [[trial for trial in trials if trial.joinable], *([trial] for trial in trials if not trial.joinable)]
    for group in groups:
        model = joint if len(group) > 1 else None
        backward = [trial for trial in group if not trial.wants_forward]
        _backward(model, backward)
        for trains in (True, False):
            wanting = [trial for trial in group if trial.wants_forward and trial.trains == trains]
            if trains and backward:
                for trial in wanting:
                    trial.hold()
                continue
            with torch.set_grad_enabled(trains):
                _forward(model, wanting)


def _forward(joint: MultiTrialModel | None, trials: Sequence[RunningTrial[Any]]) -> None:
    """One pass for all trials. If it fails, each half runs separately; a single trial receives its own error."""
    if not trials:
        return
    outputs = None
    try:
        outputs = _run(joint, trials)
    except Exception as error:
        if len(trials) == 1:
            trials[0].fail(error)
            return
        _log_failure(error, len(trials))
    if outputs is None:  # outside the except block, where the error no longer holds the failed pass's tensors
        torch.cuda.empty_cache()
        _forward(joint, trials[: len(trials) // 2])
        _forward(joint, trials[len(trials) // 2 :])
        return
    for trial, trial_outputs in zip(trials, outputs, strict=True):
        trial.answer(trial_outputs)


def _run(joint: MultiTrialModel | None, trials: Sequence[RunningTrial[Any]]) -> list[TokenLogps]:
    """The last requested forward pass of each trial."""
    passes = [trial.forward for trial in trials if trial.forward is not None]
    return joint.forward(passes) if joint is not None else [forward.run() for forward in passes]


def _backward(joint: MultiTrialModel | None, trials: Sequence[RunningTrial[Any]], again: bool = False) -> None:
    """One backward pass for all, or in halves as above. ``again``: repeat the forward pass first, as its graph is freed."""
    if not trials:
        return
    models = [trial.forward.model for trial in trials if trial.forward is not None] if len(trials) > 1 else []
    earlier = [pair for model in models for pair in set_gradients_aside(model)]
    succeeded = _try_backward(joint, trials, again)
    for parameter, gradient in earlier:
        _restore_gradient(parameter, gradient, keep_new=succeeded)
    if not succeeded and len(trials) > 1:
        torch.cuda.empty_cache()
        _backward(joint, trials[: len(trials) // 2], again=True)
        _backward(joint, trials[len(trials) // 2 :], again=True)


def _try_backward(joint: MultiTrialModel | None, trials: Sequence[RunningTrial[Any]], again: bool) -> bool:
    """Whether the pass succeeded; its graphs are freed either way. A single trial receives its own error."""
    try:
        if again:
            for trial, trial_outputs in zip(trials, _run(joint, trials), strict=True):
                trial.recomputed(trial_outputs)
        starts = [trial.outputs_and_gradients() for trial in trials]
        outputs, gradients = [t for some, _ in starts for t in some], [g for _, some in starts for g in some]
        torch.autograd.backward(outputs, gradients, retain_graph=any(trial.keeps_graph for trial in trials))
        return True
    except Exception as error:
        if len(trials) == 1:
            trials[0].fail(error)
        else:
            _log_failure(error, len(trials))
        return False
    finally:
        for trial in trials:
            trial.free_graph()


def _restore_gradient(parameter: torch.nn.Parameter, earlier: torch.Tensor | None, keep_new: bool) -> None:
    """Give a parameter its earlier gradient back, plus the new one if ``keep_new``."""
    new = parameter.grad if keep_new else None
    if earlier is not None and new is not None:
        new = earlier.add_(new)  # in place, as autograd accumulates
    parameter.grad = earlier if new is None else new


def _log_failure(error: Exception, trials: int) -> None:
    if not isinstance(error, torch.cuda.OutOfMemoryError):
        print(f"a pass of {trials} co-batched trials failed ({error}); running it in halves", flush=True)


def best_trials_per_pass(joint: MultiTrialModel, forward: ForwardPass) -> int:
    """The fastest number of trials per pass on this device, measured with one trial's batch."""
    best, seconds, failed = measure_trials_per_pass(joint, forward)
    times = ", ".join(f"{trials}: {trial_s:.3f}" for trials, trial_s in seconds.items())
    more = f"; a pass of {failed[0]} failed: {failed[1]}" if failed else ""
    print(f"trials per pass: {best} (measured seconds per trial and step, by trials per pass: {times}{more})", flush=True)
    return best
