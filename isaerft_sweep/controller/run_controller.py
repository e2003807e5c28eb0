"""Runs a controller until its sweep is over or a user asks it to stop, and explains disk errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from isaerft_sweep.controller.controller_info import write_controller_info
from isaerft_sweep.controller.live_view import LiveView
from isaerft_sweep.controller.loop import SweepController
from isaerft_sweep.controller.stop_signal import StopRequest
from isaerft_sweep.controller.trial_factory import TrialFactory
from isaerft_sweep.dispatch.base import Dispatcher
from isaerft_sweep.errors import FolderError, disk_failure
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.scheduling.sweep_state import SweepState
from isaerft_sweep.terminal import make_console

INTERRUPTED = 130
"""Exit code after a request to stop."""


def run_controller(factory: TrialFactory, state: SweepState, dispatcher: Dispatcher[Any], trials: int) -> int:
    """Run the sweep's trials; how urgent the request to stop was, 0 without one.

    Args:
        factory: creates the trials; has the sweep's experiment and folder.
        state: restored from the journal.
        dispatcher: runs the trials; closed at the end.
        trials: the number of trials of the sweep, for display.
    """
    folder, launcher = factory.folder, factory.experiment.launcher
    agent = factory.agent_run.agent if factory.agent_run else None
    with LiveView(make_console(), factory.definition.metric.name, trials, folder) as view:
        stop = StopRequest(folder.cancel, agent, notify=lambda request: view.note(request.message(launcher.grace_s)))
        with stop.signals_counted(), write_controller_info(folder, trials, factory.overrides), closed_in_the_end(dispatcher):
            SweepController(state, folder, dispatcher, launcher, view, lambda: stop.urgency).run()
            return stop.urgency  # before ``signals_counted`` removes the file that may have asked


@contextmanager
def closed_in_the_end(dispatcher: Dispatcher[Any]) -> Iterator[None]:
    """Close the dispatcher after the block. When the block raises, errors of closing are suppressed."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            dispatcher.close()
        raise
    dispatcher.close()


@contextmanager
def disk_errors_named(folder: SweepFolder) -> Iterator[None]:
    """Turn an OSError of any write in the block into a FolderError that says what to do."""
    try:
        yield
    except OSError as error:
        if (message := disk_failure(error, folder.path)) is None:
            raise
        raise FolderError(message) from error
