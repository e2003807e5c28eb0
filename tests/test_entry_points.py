"""However a command ends: one clear line, an exit code that tells, no traceback; on a terminal that knows ASCII alone too."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY
from helpers.sweeps import ended, made
from helpers.waiting import wait_for
from hypothesis import given
from hypothesis import strategies as st

from isaerft_sweep import cli, guard
from isaerft_sweep.cli import adapter_commands, result_commands
from isaerft_sweep.dispatch.job import ending_clearly
from isaerft_sweep.errors import ConfigError
from isaerft_sweep.guard import guarded
from isaerft_sweep.terminal import make_console, speak_any_encoding

BIN = Path(sys.executable).parent
ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PACKAGE = str(Path(__file__).parents[1])


def fails(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


def test_how_a_command_ends(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    assert guarded(lambda: None) == 0 and guarded(lambda: 7) == 7
    assert guarded(fails(ConfigError("beta must be at least 0."))) == 2
    assert guarded(fails(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.splitlines() == ["error: beta must be at least 0.", "Stopped."]
    with pytest.raises(SystemExit):
        guarded(fails(SystemExit(3)))


@pytest.mark.parametrize("error", [ValueError("no such\nthing"), KeyError("x"), ConnectionError("reset"), MemoryError()])
def test_an_unexpected_error_is_one_line_and_a_trace_in_a_file(
    error: Exception, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    assert guarded(fails(error)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {type(error).__name__}") and "Traceback" not in line
    log = Path(line.rpartition(" ")[2])
    assert (
        log.parent == cache / "errors" and "Traceback (most recent call last)" in log.read_text() and "in fails" not in line
    )


def test_a_trace_finds_another_place_when_the_cache_takes_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ISAERFT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert guarded(fails(ValueError("x"))) == 1
    assert Path(capsys.readouterr().err.split()[-1]).parent == tmp_path
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    assert guarded(fails(ValueError("x"))) == 1
    assert "Traceback" in capsys.readouterr().err, "better here than nowhere"


def test_a_worker_ends_with_one_line_and_its_trace_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended_with, ending_clearly(tmp_path):
        raise RuntimeError("libcuda.so: not found")
    assert ended_with.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    (log,) = tmp_path.glob("error-*.log")
    assert line == f"error: RuntimeError: libcuda.so: not found. This should not happen; the whole trace is in {log}"
    assert "Traceback" in log.read_text()


def test_every_command_goes_through_the_guard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("_leaderboard", "_best", "_report"):
        monkeypatch.setattr(result_commands, name, lambda _args: fails(ZeroDivisionError("by zero"))())
    monkeypatch.setattr(adapter_commands, "_card", lambda _args: fails(ZeroDivisionError("by zero"))())
    for command in (["leaderboard", "x"], ["best", "x"], ["report", "x"], ["card", "x"]):
        assert cli.main(command) == 1
        assert capsys.readouterr().err.startswith("error: ZeroDivisionError: by zero")


def run_cli(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "isaerft_sweep.cli", *arguments]
    given = {**os.environ, "PYTHONPATH": PACKAGE, **environment}
    return subprocess.run(command, cwd=cwd, capture_output=True, env=given, timeout=120, check=False)


def test_a_reader_that_has_gone_is_no_error(tmp_path: Path) -> None:
    journal = made(tmp_path / "s", 1)
    journal.folder.trial("run-0").log.write_text("a line\n" * 100_000)
    journal.close()
    shell = f"{sys.executable} -m isaerft_sweep.cli logs s 1 | head -1"
    given = {**os.environ, "PYTHONPATH": PACKAGE}
    done = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, text=True, env=given, check=True)
    assert done.stdout == "a line\n" and done.stderr == ""


@given(st.text())
def test_any_text_can_be_printed_anywhere(text: str) -> None:
    for encoding in ("ascii", "latin-1", "utf-8"):
        raw = io.BytesIO()
        stream, before = io.TextIOWrapper(raw, encoding=encoding), sys.stdout
        sys.stdout = stream
        try:
            speak_any_encoding()
            print(text, "\udce9", flush=True)
        finally:
            sys.stdout = before
        assert raw.getvalue().decode(encoding)
        assert "\ufffd" not in raw.getvalue().decode(encoding) or "\ufffd" in text


def test_what_a_terminal_has_not_is_written_as_near_as_it_can_be() -> None:
    raw = io.BytesIO()
    stream, before = io.TextIOWrapper(raw, encoding="ascii"), sys.stdout
    sys.stdout = stream
    try:
        speak_any_encoding()
        print("0.1 … 0.2 – ± é → 漢", flush=True)
    finally:
        sys.stdout = before
    assert raw.getvalue() == b"0.1 ... 0.2 - +/- e -> ?\n"


def test_commands_on_an_ascii_terminal(tmp_path: Path) -> None:
    journal = made(tmp_path / "s", 2)
    for index in range(2):
        journal.write("dispatch", index=index, attempt=1, job={"kind": "local", "pid": 1, "start": 1.0})
    journal.folder.trial("run-0").log.write_text("café …\n", encoding="utf-8")
    ended(journal, 0, "failed", message="the loss rose … to 1e9", given_up=True)
    ended(journal, 1, "completed", metric=0.5)
    journal.close()
    for command in (
        ("status", "s"), ("status", "s", "--json"), ("status", "."), ("leaderboard", "s"), ("logs", "s", "1"), ("best", "s"),
        ("report", "s"), ("card", "--fields"), ("leaderboard", "nowhere-é"), ("retry", "s", "2"), ("--help",), ("status", "--help"),
    ):  # fmt: skip
        done = run_cli(tmp_path, *command, **ASCII)
        said = done.stdout + done.stderr
        assert said.isascii() and b"Traceback" not in said and b"UnicodeEncodeError" not in said, (command, said)
        assert done.returncode in (0, 2), (command, done.returncode, said)


def test_a_dumb_terminal_is_as_wide_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is broken, no table is cut to 80 columns, and nothing moves a cursor."""
    code = (
        "from isaerft_sweep.terminal import make_console, is_live; from rich.table import Table; c = make_console(); "
        "t = Table('x' * 60, 'y' * 60, box=None); t.add_row('a', 'b'); c.print(t); c.print('word ' * 30); print(is_live(c), c.width)"
    )
    shell = f'unset COLUMNS LINES; stty cols 150; {sys.executable} -c "{code}"'
    import pty

    said = []

    def read(handle: int) -> bytes:
        data = os.read(handle, 4096)
        said.append(data)
        return data

    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("PYTHONPATH", PACKAGE)
    pty.spawn(["sh", "-c", shell], read, lambda _handle: b"")
    lines = b"".join(said).decode().splitlines()
    assert lines[0].split() == ["x" * 60, "y" * 60] and lines[2].rstrip() == ("word " * 30).rstrip()
    assert lines[-1] == "False 150" and "\x1b" not in "".join(lines)
    assert make_console().soft_wrap


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A finished sweep of one trial; its folder lies in ``outputs``."""
    place = tmp_path_factory.mktemp("entry")
    given = {**os.environ, "PYTHONPATH": PACKAGE, "ISAERFT_CACHE": str(cache), **ASCII}
    command = [sys.executable, "-m", "isaerft_sweep.launch", *TINY, "name=s", "sweep.run_cap=2", "tracker=disabled"]
    done = subprocess.run(command, cwd=place, capture_output=True, env=given, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()
    said = done.stdout + done.stderr
    assert said.isascii() and b"Leaderboard" in said, "a whole sweep on a terminal that knows ASCII alone"
    return place


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [1.0, 3.0, 6.0])
@pytest.mark.parametrize(
    "command",
    [
        ("generate", "outputs/s", *(["--prompt", "Hello?"] * 40), "--max-new-tokens", "200"),
        ("report", "outputs/s", "--out", "r", *(["--prompt", "Hello?"] * 40), "--max-new-tokens", "200"),
        ("plan", "--calibrate", *TINY, "orpo.max_steps=5000", "output=plans"),
        ("confirm", "outputs/s", "--seeds", "40"),
    ],
    ids=lambda command: command[0],
)
def test_ctrl_c_is_one_line_and_130(command: tuple[str, ...], after_s: float, sweep: Path) -> None:
    given = {**os.environ, "PYTHONPATH": PACKAGE}
    process = subprocess.Popen(
        [sys.executable, "-m", "isaerft_sweep.cli", *command], cwd=sweep, env=given, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the command gets it
    out, err = process.communicate(timeout=90)
    assert process.returncode == 130, (process.returncode, out, err)
    assert "Traceback" not in out + err
    lines = [line for line in err.splitlines() if line and not re.match(r"the best trial by|.*contains beta|.*warn", line)]
    assert lines in (["Stopped."], []), err
    assert lines or "nothing is left running" in out


def test_an_interrupt_inside_exec_ends_with_130(tmp_path: Path) -> None:
    """CPython alone ends by the signal: returncode -2."""
    (tmp_path / "interrupted.py").write_text(
        "import sys\nfrom isaerft_sweep.guard import guarded\n"
        "sys.exit(guarded(lambda: exec('import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)')))\n"
    )
    given = {**os.environ, "PYTHONPATH": f"{PACKAGE}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-m", "interrupted"], env=given, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "Stopped.\n")


@pytest.mark.slow
@pytest.mark.long
def test_ctrl_c_in_attach(sweep: Path, tmp_path: Path) -> None:
    """While it follows, and while it goes on with the sweep itself."""
    long = [*TINY, "name=long", f"output={tmp_path}", "sweep.run_cap=1", "orpo.max_steps=100000", "tracker=disabled"]
    given = {**os.environ, "PYTHONPATH": PACKAGE}
    controller = subprocess.Popen(
        [sys.executable, "-m", "isaerft_sweep.launch", *long], cwd=tmp_path, env=given, stdout=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: list(tmp_path.glob("long/trials/*/metrics.jsonl")))
        for stage in ("follows", "goes on"):
            attached = subprocess.Popen(
                [sys.executable, "-m", "isaerft_sweep.cli", "attach", str(tmp_path / "long")], env=given, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            time.sleep(5)
            attached.send_signal(signal.SIGINT)
            out, err = attached.communicate(timeout=90)
            assert attached.returncode == 130 and err in ("", "Stopped.\n"), (stage, out, err)
            if stage == "follows":
                assert out.strip().endswith("Left. The sweep continues.") and controller.poll() is None
                controller.send_signal(signal.SIGINT)
                assert controller.wait(90) == 130
    finally:
        controller.kill()


def test_exit_codes_are_told_apart() -> None:
    assert len({0, guard.UNEXPECTED, guard.WRONG, guard.INTERRUPTED, guard.BROKEN_PIPE}) == 5


def test_brackets_and_colons_in_a_message_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rich would take ``[/tmp/x]`` for markup that closes nothing, and ``:warning:`` for a picture."""
    journal = made(tmp_path / "a[bold]b", 1)
    journal.write("dispatch", index=0, attempt=1, job={"kind": "local", "pid": 1, "start": 1.0})
    message = "OSError: [Errno 28] no room in [/tmp/x] :warning:"
    ended(journal, 0, "failed", message=message, given_up=True)
    journal.close()
    for command in (["status", str(tmp_path / "a[bold]b")], ["status", str(tmp_path)]):
        assert cli.main(command) == 0
        said = capsys.readouterr().out
        assert "a[bold]b" in said and (message in said or command[1] == str(tmp_path))
    assert cli.main(["leaderboard", str(tmp_path / "a[bold]b")]) == 0


def test_commands_and_options_complete_on_tab() -> None:
    """In a real bash, with the script that ``--print-completion`` prints."""
    program = Path(sys.executable).with_name("isaerft-sweep")
    shell = f"""
        eval "$({program} --print-completion bash)"
        complete_words() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_isaerft_sweep; echo "${{COMPREPLY[@]}}"; }}
        complete_words isaerft-sweep lead
        complete_words isaerft-sweep best --a
    """
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["leaderboard", "--as"], done.stderr


@pytest.mark.parametrize(("module", "command"), [("hydra", "isaerft_sweep.launch"), ("shtab", "isaerft_sweep.cli")])
def test_ctrl_c_during_the_imports_is_one_line(module: str, command: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{PACKAGE}"}
    done = subprocess.run(
        [sys.executable, "-m", command, "x=1"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stderr == "Stopped.\n" and done.returncode in (130, -2)


def test_overrides_may_follow_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "orpo=quick", "--wait", "1", "model=nope"]) == 2
    assert "there is no model 'nope'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["doctor", "orpo=quick", "--wait", "1", "--nope"])
    assert "unrecognized arguments: --nope" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["best", "outputs/x", "more=1"])
