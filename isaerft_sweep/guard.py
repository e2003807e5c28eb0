"""How every command ends: one clear line and a meaningful exit code, whatever happened."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from isaerft_sweep.errors import IsaerftError, disk_failure
from isaerft_sweep.paths import cache_folder
from isaerft_sweep.terminal import speak_any_encoding

UNEXPECTED, WRONG, INTERRUPTED = 1, 2, 130
BROKEN_PIPE = 141
"""What a shell reports for a command whose pipe lost its reader (128 + SIGPIPE)."""


def ignore_pefts_old_name() -> None:
    """Do not warn that PEFT asks transformers for gradient checkpointing by its earlier name, in every trial."""
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*is deprecated", category=FutureWarning)


def guarded(run: Callable[[], int | None], interrupted: str = "Stopped.") -> int:
    """The exit code of ``run``: 2 after an error that the user can fix, 130 after Ctrl-C, 1 after any other one.

    ``interrupted``: the message after Ctrl-C. The traceback of an unexpected error goes to a file.
    """
    speak_any_encoding()
    try:
        code = run() or 0
        sys.stdout.flush()  # here, while an error can still be reported
        return code
    except KeyboardInterrupt:
        # CPython ends by the signal itself, with another code, if the interrupt came through an exec() of text on its way
        # here, as dataclasses do: the signal is blocked then, and the code counts
        atexit.register(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGINT})
        _say(interrupted)
        return INTERRUPTED
    except IsaerftError as error:
        _say(f"error: {error}")
        return WRONG
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE
    except Exception as error:
        if refused := disk_failure(error, "a file", named_files=False):
            _say(f"error: {refused}")
            return WRONG
        _say(f"error: {unexpected(error)}")
        return UNEXPECTED


def unexpected(error: BaseException, folder: Path | None = None) -> str:
    """One line about an unexpected error, with the file that has its traceback: in ``folder`` if it can be written."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    summary = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    trace_file = keep_trace("".join(traceback.format_exception(error)), folder)
    return f"{summary}. This should not happen; the whole trace is in {trace_file}" if trace_file else f"{summary}."


def of_process(done: subprocess.CompletedProcess[str]) -> str:
    """One line about a subprocess that failed, with the file that has its whole output."""
    last_line = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no output")
    outcome = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with code {done.returncode}"
    trace_file = keep_trace(done.stderr or done.stdout)
    return f"{outcome}: {last_line.strip()}" + (f" The whole trace is in {trace_file}" if trace_file else "")


def keep_trace(text: str, preferred: Path | None = None) -> Path | None:
    """Write a traceback to a new file, in the folder ``preferred`` if possible; None when it could only be printed."""
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    content = f"{' '.join(sys.argv)}\n\n{text}"
    for folder in (
        *([preferred] if preferred and preferred.is_dir() else []),
        cache_folder() / "errors",
        Path(tempfile.gettempdir()),
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / name
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(content + "\n")
            return path
        except OSError:
            continue
    _say(text)
    return None


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _discard_output()


def _discard_output() -> None:
    """Send what is still buffered to /dev/null: Python flushes it at exit, which would raise again."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(devnull, stream.fileno())
