"""The Makefile finds a Python that is new enough, or says what it needs before it leaves anything behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OLD = """#!/bin/sh
[ "$1" = --version ] && echo "Python 3.9.2" && exit 0
case "$2" in *version_info*) exit 1;; esac
mkdir -p "$3/bin"
exit 0
"""


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def old_machine(tmp_path: Path) -> Path:
    """A folder of programs, the only one in PATH, whose python3 is 3.9."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("make", "sh", "rm", "mkdir", "touch", "echo", "test"):
        (programs / name).symlink_to(str(shutil.which(name)))
    program(programs / "python3", OLD)
    return programs


def make(programs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": str(programs)}
    command = ["make", "-C", str(ROOT), f"VENV={programs.parent / 'venv'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def test_a_python_that_is_too_old_is_refused_before_anything_is_made(old_machine: Path) -> None:
    for arguments in (["setup"], ["setup", "PYTHON=python3"]):
        done = make(old_machine, *arguments)
        assert done.returncode != 0 and "Python 3.11 or newer is needed, but python3 is Python 3.9.2" in done.stderr
        assert not (old_machine.parent / "venv").exists()


def test_a_newer_one_beside_it_is_taken(old_machine: Path) -> None:
    (old_machine / "python3.12").symlink_to(sys.executable)
    done = make(old_machine, "setup", "--dry-run")
    assert done.returncode == 0 and "python3.12 -m venv" in done.stdout


def test_an_environment_that_an_old_python_left_is_made_again(old_machine: Path) -> None:
    left = old_machine.parent / "venv" / "bin"
    left.mkdir(parents=True)
    (left.parent / "pyvenv.cfg").touch()
    program(left / "python", OLD)
    program(old_machine / "python3.11", OLD.replace("exit 1", "exit 0"))  # new enough, and makes no environment
    make(old_machine, "setup")
    assert not (left / "python").exists()
