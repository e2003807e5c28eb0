"""A write that the disk refuses is named in one line, whichever library wrote."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from isaerft_sweep.dispatch.base import tail
from isaerft_sweep.errors import disk_failure
from isaerft_sweep.guard import guarded

Write = Callable[[Path], object]
LARGE = {"weight": torch.zeros(100_000)}


def save_to_a_handle(path: Path) -> None:
    with path.open("wb") as handle:
        torch.save(LARGE, handle)


WRITERS: dict[str, Write] = {
    "text": lambda path: path.write_text("x" * 400_000),
    "torch": lambda path: torch.save(LARGE, path),
    "torch, to a handle": save_to_a_handle,
    "safetensors": lambda path: safetensors.torch.save_file(LARGE, path),
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "small"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk of its own cannot be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_recognised_through_every_library(write: Write, small_disk: Path) -> None:
    with pytest.raises(Exception) as raised:
        write(small_disk / "file")
    message = disk_failure(raised.value, "outputs/s")
    assert message is not None and "cannot be written" in message and "Make room" in message
    assert guarded(lambda: write(small_disk / "file")) == 2  # type: ignore[arg-type, return-value]


def test_a_damaged_file_is_no_full_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"PK" + b"0" * 1000)
    with pytest.raises(Exception) as raised:
        torch.load(tmp_path / "file")
    assert disk_failure(raised.value, "x") is None


def test_other_errors_are_no_disk_failure() -> None:
    assert disk_failure(ValueError("no"), "x") is None
    assert disk_failure(OSError(errno.ECONNRESET, "reset"), "x") is None
    assert disk_failure(PermissionError(errno.EACCES, "denied", "a.txt"), "x") is not None
    late = RuntimeError("later")
    late.__context__ = PermissionError(errno.EACCES, "denied", "a.txt")
    assert disk_failure(late, "x") is None, "it was handled: the later error is another one"


def test_the_tail_of_a_log_has_no_frames(tmp_path: Path) -> None:
    log = tmp_path / "log.out"
    log.write_text(
        "step 1\nTraceback (most recent call last):\n  File 'a.py', line 1, in f\n    g()\n    ~^^\nKeyError: 'a'\n\n"
        "During handling of the above exception, another exception occurred:\n\n"
        "Traceback (most recent call last):\n  File 'b.py', line 1, in f\nValueError: b\nthe end\n"
    )
    assert [line for line in tail(log, 8).splitlines() if line] == ["step 1", "KeyError: 'a'", "ValueError: b", "the end"]
