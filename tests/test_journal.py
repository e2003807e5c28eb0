from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isaerft_sweep.errors import FolderError, JournalError
from isaerft_sweep.journal.atomic_files import create_once, read_json, read_rows, write_json
from isaerft_sweep.journal.journal import Journal, SweepRecord, read_record, replay
from isaerft_sweep.journal.layout import SweepFolder

ENDS = st.sampled_from(["completed", "failed", "diverged", "stopped"])
HISTORIES = st.lists(st.tuples(st.integers(0, 4), ENDS, st.one_of(st.none(), st.floats(-10, 10))), max_size=12)


def write_history(folder: SweepFolder, history: list) -> None:
    journal = Journal(folder)
    journal.write("sweep", sweep_id="s", question="q", metric="eval/loss", goal="minimize")
    for index, state, metric in history:
        if index not in journal.record.trials:
            journal.write("trial", index=index, name=f"t{index}", run_id=f"r{index}", params={"orpo.beta": 0.1}, unit={})
        journal.write(
            "dispatch", index=index, attempt=journal.record.trials[index].attempt + 1, job={"kind": "local", "pid": 1}
        )
        journal.write("end", index=index, state=state, metric=metric, message="", seconds=1.0, given_up=state == "failed")
    journal.close()


@settings(deadline=None)
@given(HISTORIES)
def test_a_new_process_knows_what_the_old_one_knew(tmp_path_factory: pytest.TempPathFactory, history: list) -> None:
    folder = SweepFolder(tmp_path_factory.mktemp("sweep"))
    write_history(folder, history)
    first, second = SweepRecord(), SweepRecord()
    replay(folder.journal, first)
    journal = Journal(folder)
    journal.close()
    replay(folder.journal, second)
    assert first == second == journal.record


@settings(deadline=None)
@given(HISTORIES, st.floats(0, 1))
def test_cut_anywhere_every_whole_line_survives(
    tmp_path_factory: pytest.TempPathFactory, history: list, where: float
) -> None:
    folder = SweepFolder(tmp_path_factory.mktemp("sweep"))
    write_history(folder, history)
    content = folder.journal.read_bytes()
    cut = content[: int(len(content) * where)]
    folder.journal.write_bytes(cut)
    journal = Journal(folder)
    journal.close()
    assert folder.journal.read_bytes() == cut[: cut.rfind(b"\n") + 1]


def test_one_controller_at_a_time(tmp_path: Path) -> None:
    journal = Journal(SweepFolder(tmp_path))
    code = (
        f"from isaerft_sweep.journal.journal import *; Journal(SweepFolder(__import__('pathlib').Path({str(tmp_path)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "is being run by another process" in done.stderr
    journal.close()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("line", [b"[]", b"{}", b'{"event":"magic"}', b'{"event":"end","index":7}', b"null", b"\xff"])
def test_a_broken_line_is_named(tmp_path: Path, line: bytes) -> None:
    folder = SweepFolder(tmp_path)
    write_history(folder, [(0, "completed", 1.0)])
    folder.journal.write_bytes(folder.journal.read_bytes() + line + b"\n")
    with pytest.raises(JournalError, match=r"line 5 is not a journal entry"):
        Journal(folder)


def test_a_trial_that_is_tried_again_has_all_its_retries_after_a_restart_too(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    journal = Journal(folder)
    journal.write("trial", index=0, name="a", run_id="a", params={}, unit={})
    for attempt in (1, 2):
        journal.write("dispatch", index=0, attempt=attempt, job={"kind": "local", "pid": 1})
        given_up = {"state": "failed", "metric": None, "message": "", "seconds": 1.0, "given_up": attempt == 2}
        journal.write("end", index=0, **given_up)
    assert journal.record.trials[0].failures == 2
    journal.write("dispatch", index=0, attempt=3, job={"kind": "local", "pid": 1})
    journal.close()
    assert read_record(folder).trials[0].failures == 0


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    journal = Journal(SweepFolder(tmp_path))
    os.close(journal._log._file)
    journal._log._file = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(FolderError, match="cannot be written"):
        journal.write("sweep", sweep_id="s", question="q", metric="m", goal="minimize")
    journal.close()


def test_json_is_replaced_whole_and_rows_may_be_torn(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_json(path) is None
    stop = threading.Event()

    def rewrite() -> None:
        n = 0
        while not stop.is_set():
            write_json(path, {"n": n, "fill": "x" * 5000})
            n += 1

    write_json(path, {"n": 0})
    writer = threading.Thread(target=rewrite)
    writer.start()
    for _ in range(300):
        assert "n" in read_json(path)
    stop.set()
    writer.join()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_rows(rows) == [{"step": 1}]


def test_created_once_by_many_and_never_half(tmp_path: Path) -> None:
    calls: list[int] = []

    def make(folder: Path) -> None:
        calls.append(1)
        (folder / "file").write_text("whole")

    threads = [threading.Thread(target=create_once, args=(tmp_path / "made", make)) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(calls) == 1 and (tmp_path / "made" / "file").read_text() == "whole"

    def fails(folder: Path) -> None:
        (folder / "half").write_text("")
        raise ValueError

    with pytest.raises(ValueError):
        create_once(tmp_path / "never", fails)
    assert not (tmp_path / "never").exists()
