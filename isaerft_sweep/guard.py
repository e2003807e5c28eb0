"""The end of every command: one clear line, and an exit code that tells, whatever has happened."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from isaerft_sweep.errors import IsaerftError
from isaerft_sweep.paths import cache_folder
from isaerft_sweep.terminal import speak_any_encoding

UNEXPECTED, WRONG, INTERRUPTED = 1, 2, 130
NOBODY_READS = 141
"""What a shell says of a command that the pipe's other end has left (128 + SIGPIPE)."""


def guarded(run: Callable[[], int | None], interrupted: str = "Stopped.") -> int:
    """The exit code of ``run``: 2 after an error that the user can mend, 130 after Ctrl-C, 1 after any other one.

    ``interrupted``: what is said after Ctrl-C. The trace of an error that nobody has foreseen goes to a file.
    """
    speak_any_encoding()
    try:
        code = run() or 0
        sys.stdout.flush()  # here, where it can still be told of
        return code
    except KeyboardInterrupt:
        _say(interrupted)
        return INTERRUPTED
    except IsaerftError as error:
        _say(f"error: {error}")
        return WRONG
    except BrokenPipeError:
        _leave_the_pipe()
        return NOBODY_READS
    except Exception as error:
        _say(f"error: {unexpected(error)}")
        return UNEXPECTED


def unexpected(error: BaseException, folder: Path | None = None) -> str:
    """One line about an error that nobody has foreseen, with the file that has its trace, in ``folder`` if that can be."""
    first = next(iter(str(error).strip().splitlines()), "")
    words = f"{type(error).__name__}: {first}" if first else type(error).__name__
    kept = keep_trace("".join(traceback.format_exception(error)), folder)
    return f"{words}. This should not happen; the whole trace is in {kept}" if kept else f"{words}."


def of_process(done: subprocess.CompletedProcess[str]) -> str:
    """One line about a process of ours that has failed, with the file that has all that it said."""
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
    how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with code {done.returncode}"
    kept = keep_trace(done.stderr or done.stdout)
    return f"{how}: {last.strip()}" + (f" The whole trace is in {kept}" if kept else "")


def keep_trace(text: str, wanted: Path | None = None) -> Path | None:
    """Write a trace to a file of its own, in the folder ``wanted`` if that can be; None after it could only be printed."""
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    content = f"{' '.join(sys.argv)}\n\n{text}"
    for folder in (
        *([wanted] if wanted and wanted.is_dir() else []),
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
        _leave_the_pipe()


def _leave_the_pipe() -> None:
    """Python writes what is left when it ends, and would complain that nobody reads it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
