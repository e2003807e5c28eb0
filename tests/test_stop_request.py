"""Who asks a controller to stop is told at once how long it may take, and is heard between two turns."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from isaerft_sweep.controller.stop_signal import AT_ONCE, IN_ORDER, StopRequest, ask_to_stop, wait


def test_each_request_is_told_of_once_with_the_real_grace(tmp_path: Path) -> None:
    stop, said = StopRequest(tmp_path / "cancel"), []
    stop.notify = lambda request: said.append(request.message(90.0))
    with stop.signals_counted():
        assert stop.urgency == 0 and said == []
        os.kill(os.getpid(), signal.SIGINT)
        assert said == ["stopping, at most 90 s; Ctrl-C again ends it now"], "from within the handler"
        assert stop.urgency == IN_ORDER and len(said) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.urgency == AT_ONCE and said[1:] == ["ending all trials now"]


def test_a_request_by_file_does_not_speak_of_a_key(tmp_path: Path) -> None:
    stop, said = StopRequest(tmp_path / "cancel"), []
    stop.notify = lambda request: said.append(request.message(60.0))
    ask_to_stop(stop.file, at_once=False)
    assert stop.urgency == IN_ORDER and said == ["stopping, at most 60 s"]


def test_what_could_not_be_said_in_the_middle_of_a_write_is_said_the_next_time(tmp_path: Path) -> None:
    stop, said = StopRequest(tmp_path / "cancel", signals=1), []

    def reentrant(request: StopRequest) -> None:
        said.append(request.message(1))
        if len(said) == 1:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    stop.notify = reentrant
    assert stop.urgency == stop.urgency == IN_ORDER and len(said) == 2


@pytest.mark.parametrize("how", ["signal", "file"])
def test_a_long_turn_ends_when_somebody_asks(how: str, tmp_path: Path) -> None:
    stop = StopRequest(tmp_path / "cancel")
    ask = (lambda: os.kill(os.getpid(), signal.SIGINT)) if how == "signal" else (lambda: ask_to_stop(stop.file, False))
    with stop.signals_counted():
        threading.Timer(0.3, ask).start()
        began = time.monotonic()
        wait(30, lambda: stop.urgency)
        assert 0.25 < time.monotonic() - began < 1.0
        wait(0.1, lambda: stop.urgency)  # the next turns have their time again
