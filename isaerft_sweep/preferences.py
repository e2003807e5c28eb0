"""Reads files of preference pairs and checks them row by row, without torch."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from isaerft_sweep.errors import DataError
from isaerft_sweep.specs import DataSpec

ANSWERS = ("chosen", "rejected")
COLUMNS = ("prompt", *ANSWERS, "chat_template_kwargs")
"""The columns that TRL reads; others are dropped."""
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
FORM = 'Right form: {"prompt": "…", "chosen": "…", "rejected": "…"}, as text or as [{"role": …, "content": …}].'
LFS_POINTER = "version https://git-lfs.github.com"
"""The first bytes of a Git LFS pointer, which stands for a large file that was not fetched."""
PROGRESS = "progress: "
"""Prefix of the check's output lines that the waiting user should see."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Written:
    """One row of a file, with the columns that TRL reads; ``where`` names its file and line."""

    where: str
    row: Row

    @property
    def is_chat(self) -> bool:
        return isinstance(self.row["chosen"], list)


def check_files(spec: DataSpec) -> None:
    """Raise DataError unless the files of ``spec`` exist and hold rows of the right form."""
    if spec.source != "files":
        return
    path, eval_path = data_files(spec)
    for file, key in ((path, "data.path"), (eval_path, "data.eval_path")):
        for _ in read_pairs(file, key) if file else ():
            pass


def data_files(spec: DataSpec) -> tuple[Path, Path | None]:
    """``data.path`` and ``data.eval_path``. Raises DataError when both are the same file."""
    path, eval_path = expanded(str(spec.path)), expanded(spec.eval_path) if spec.eval_path else None
    if eval_path and path.is_file() and eval_path.is_file() and path.samefile(eval_path):
        raise DataError(
            f"data.eval_path must be another file than data.path but both are '{path}': trials would be judged by what they "
            "were trained on. Leave data.eval_path out, and data.eval_size pairs are held out."
        )
    return path, eval_path


def expanded(path: str) -> Path:
    """``path`` with ``~`` expanded; left unchanged for an unknown user, and so reported as missing."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (pathlib's raises for an unknown user)


def read_pairs(path: Path, key: str = "data.path") -> Iterator[Written]:
    """The rows of a .jsonl, .jsonl.gz or .parquet file. Raises DataError that names the first invalid one.

    ``key``: the config key that names the file, for errors.
    """
    if not path.is_file():
        raise DataError(f"{key} must be a file that exists but got '{path}'.")
    if not path.name.endswith(ENDINGS):
        raise DataError(f"{key} must end in .jsonl, .jsonl.gz or .parquet but got '{path}'.")
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    return check_same_format(Written(where, check_row(row, where)) for where, row in rows)


def check_same_format(rows: Iterable[Written]) -> Iterator[Written]:
    """The rows. Raises DataError at one whose form (text or chat messages) differs: a column of TRL's table has one type."""
    first: Written | None = None
    for row in rows:
        first = first or row
        if row.is_chat != first.is_chat:
            forms = ("chat messages", "text") if row.is_chat else ("text", "chat messages")
            raise DataError(
                f"{row.where}: every row must have a prompt (its own, or as the common beginning of its answers), and "
                f"all rows must be text or all be chat messages, but this one is {forms[0]} and {first.where} is {forms[1]}."
            )
        yield row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield f"{path}, row {number}", row
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}{_pointer_hint(path)}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise DataError(f"{path} cannot be read: {error}") from error
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        hint = _pointer_hint(path) or " One JSON object per line."
        raise DataError(f"{path}, line {number}: not valid JSON ({reason}).{hint}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}{_pointer_hint(path)}") from error


def _opened(path: Path) -> TextIO:
    opener = gzip.open if path.suffix == ".gz" else open
    return cast(TextIO, opener(path, "rt", encoding="utf-8-sig"))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError on a duplicate name, of which Python would silently keep the last."""
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' is there twice")
    return content


def _pointer_hint(path: Path) -> str:
    try:
        with path.open("rb") as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER.encode()
    except OSError:
        return ""
    return " It is a pointer of Git LFS: fetch the file itself with `git lfs pull`." if pointer else ""


def check_row(row: Any, where: str) -> Row:
    """The columns of a row that TRL reads. Raises DataError when it is not a pair, or TRL would misread it."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object but got {_shown(row)}. {FORM}")
    fields = {name: row[name] for name in COLUMNS if row.get(name) is not None}
    missing = [name for name in ANSWERS if name not in fields]
    if missing:
        raise DataError(f"{where}: a row must have {' and '.join(missing)} but has columns {sorted(map(str, row))}. {FORM}")
    for name in (name for name in ("prompt", *ANSWERS) if name in fields):
        _check_value(fields[name], name, where)
    chat = {name: isinstance(fields[name], list) for name in ("prompt", *ANSWERS) if name in fields}
    # a text prompt with chat answers is valid: TRL takes the prompt from the messages that both answers begin with
    if chat["chosen"] != chat["rejected"] or (chat.get("prompt") and not chat["chosen"]):
        raise DataError(f"{where}: prompt, chosen and rejected must all be text or all be chat messages. {FORM}")
    if "prompt" in row and "prompt" not in fields and not chat["chosen"]:
        raise DataError(f'{where}: prompt must be text but got null. Give an empty one as "", or leave it out. {FORM}')
    if not isinstance(fields.get("chat_template_kwargs", {}), dict):
        raise DataError(f"{where}: chat_template_kwargs must be an object but got {_shown(fields['chat_template_kwargs'])}.")
    return fields


def _check_value(value: Any, name: str, where: str) -> None:
    if value in ([], "") and (name in ANSWERS or value == []):
        hint = " Leave it out where the answers carry it." if name == "prompt" else ""
        raise DataError(f"{where}: {name} must not be empty.{hint} {FORM}")
    if isinstance(value, str):
        return
    if not isinstance(value, list) or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value):
        raise DataError(f"{where}: {name} must be text or chat messages but got {_shown(value)}. {FORM}")
    for message in value:
        if not isinstance(message["role"], str):
            raise DataError(f"{where}: a message's role in {name} must be text but got {_shown(message['role'])}. {FORM}")
        _check_content(message["content"], name, where)


def _check_content(content: Any, name: str, where: str) -> None:
    """Raise DataError unless it is text or parts of type text: a chat template would print other parts as Python code."""
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise DataError(f"{where}: a message's content in {name} must be text or parts of text but got {_shown(content)}.")
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{where}: the parts of a message's content in {name} must be of type text, "
                f'{{"type": "text", "text": "…"}}, but one is {_shown(part)}. Language models are trained on text alone.'
            )


def _shown(value: Any) -> str:
    """The value as it would stand in Python (3 and "3" differ), at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
