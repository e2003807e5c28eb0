"""Preference pairs: read, checked, split by prompt, and rid of the rows that TRL would turn into NaN."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, disable_progress_bars, load_dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
from trl.experimental.orpo import ORPOTrainer

from isaerft_sweep.errors import DataError
from isaerft_sweep.resources import asset
from isaerft_sweep.specs import DataSpec

COLUMNS = ("prompt", "chosen", "rejected")
Row = dict[str, Any]

disable_progress_bars()


@dataclass(frozen=True)
class Pairs:
    """Rows for training and evaluation, and how many were left out because their prompt fills ``max_length``."""

    train: Dataset
    evaluation: Dataset
    dropped: int
    truncated: int

    @property
    def summary(self) -> str:
        left_out = f", {self.dropped} left out (prompt fills max_length)" if self.dropped else ""
        cut = f", {self.truncated} cut at max_length" if self.truncated else ""
        return f"{len(self.train)} pairs to train on, {len(self.evaluation)} held out{left_out}{cut}"


class PairTokenizer:
    """TRL's own tokenisation of a pair, without a model: what ORPOTrainer will see."""

    tokenize_row = ORPOTrainer.tokenize_row
    build_tokenized_answer = ORPOTrainer.build_tokenized_answer
    is_encoder_decoder = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        PartialState()  # TRL warns of a prompt that fills max_length through a logger that needs it
        self.processing_class, self.max_length = tokenizer, max_length

    def __call__(self, row: Row) -> Row:
        """Token ids and labels of one row."""
        row = maybe_apply_chat_template(maybe_extract_prompt(dict(row)), self.processing_class)
        return self.tokenize_row(row)


def load_pairs(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Pairs:
    """Read, check, split and filter. Raises DataError when nothing usable is there."""
    train, evaluation = _read(spec)
    tokenize = PairTokenizer(tokenizer, max_length)
    counts = {"dropped": 0, "truncated": 0}
    usable = {}
    for name, rows in (("train", train), ("evaluation", evaluation)):
        if not rows:
            raise DataError(f"the {name} split of {spec.name} must have at least one pair but is empty. {_sizes(spec)}")
        rows = [maybe_extract_prompt(dict(row)) for row in rows]
        _check_alike(rows, f"the {name} split of {spec.name}")
        usable[name] = [row for row in rows if _fits(tokenize, row, max_length, counts)]
        if not usable[name]:
            raise DataError(
                f"no pair of the {name} split of {spec.name} fits: every prompt fills orpo.max_length={max_length} "
                "tokens and leaves no room for an answer. Raise orpo.max_length."
            )
    return Pairs(Dataset.from_list(usable["train"]), Dataset.from_list(usable["evaluation"]), **counts)


def _check_alike(rows: list[Row], where: str) -> None:
    """One form for all rows: a table has one type per column, and a prompt missing in some rows would vanish in all."""
    forms = {(frozenset(row), type(row["chosen"])) for row in rows}
    if len(forms) > 1 or "prompt" not in rows[0]:
        raise DataError(
            f"{where}: every row must have a prompt (of its own, or as the common beginning of chat answers), and all rows "
            "must be text or all be chat messages."
        )


def _fits(tokenize: PairTokenizer, row: Row, max_length: int, counts: dict[str, int]) -> bool:
    try:
        tokens = tokenize(row)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"a row cannot be tokenised ({error}): {json.dumps(row)[:300]}") from error
    answers = (tokens["chosen_labels"], tokens["rejected_labels"])
    if any(all(label == -100 for label in labels) for labels in answers):
        counts["dropped"] += 1
        return False
    counts["truncated"] += any(len(labels) >= max_length for labels in answers)
    return True


def _sizes(spec: DataSpec) -> str:
    if spec.source == "hub":
        return f"Choose other slices: data.train_split (now {spec.train_split}), data.eval_split (now {spec.eval_split})."
    return "Give more rows, or a smaller data.eval_size, or a file of its own: data.eval_path=PATH."


def _read(spec: DataSpec) -> tuple[list[Row], list[Row]]:
    if spec.source == "hub":
        return _from_hub(spec, spec.train_split), _from_hub(spec, spec.eval_split)
    path = asset("data", "courtesy.jsonl") if spec.source == "builtin" else Path(str(spec.path)).expanduser()
    rows = read_rows(path)
    if spec.eval_path:
        train, evaluation = rows, read_rows(Path(spec.eval_path).expanduser())
    else:
        train, evaluation = split_by_prompt(rows, spec.eval_size or max(1, len(rows) // 10), spec.seed)
    return train[: spec.train_size], evaluation[: spec.eval_size]


def split_by_prompt(rows: list[Row], eval_size: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Shuffle, then hold out whole prompts until ``eval_size`` pairs are there: no prompt is on both sides."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps(maybe_extract_prompt(dict(row)).get("prompt")), []).append(row)
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    train: list[Row] = []
    evaluation: list[Row] = []
    for key in keys:
        (evaluation if len(evaluation) < eval_size else train).extend(groups[key])
    random.Random(seed).shuffle(train)
    return train, evaluation


def read_rows(path: Path) -> list[Row]:
    """Rows of a .jsonl, .jsonl.gz or .parquet file, reduced to prompt, chosen and rejected."""
    if not path.is_file():
        raise DataError(f"data.path must be a file that exists but got '{path}'.")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            found = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}") from error
        return [_check_row(row, f"{path}, row {i}") for i, row in enumerate(found)]
    if path.name.endswith((".jsonl", ".jsonl.gz", ".json.gz", ".json")):
        return list(_json_rows(path))
    raise DataError(f"data.path must end in .jsonl, .jsonl.gz or .parquet but got '{path}'.")


def _json_rows(path: Path) -> Iterable[Row]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _check_row(json.loads(line), f"{path}, line {number}")
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not valid JSON ({error.msg}). One JSON object per line.") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _check_row(row: Any, where: str) -> Row:
    form = 'Right form: {"prompt": "…", "chosen": "…", "rejected": "…"}, as text or as [{"role": …, "content": …}].'
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object but got {str(row)[:80]!r}. {form}")
    missing = [name for name in ("chosen", "rejected") if not row.get(name)]
    if missing:
        raise DataError(f"{where}: a row must have {' and '.join(missing)} but has columns {sorted(row)}. {form}")
    kept = {name: row[name] for name in COLUMNS if row.get(name)}
    for name, value in kept.items():
        chat = isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
        if not chat and not isinstance(value, str):
            raise DataError(f"{where}: {name} must be text or chat messages but got {str(value)[:80]!r}. {form}")
    if len({type(value) for value in kept.values()}) > 1:
        raise DataError(f"{where}: prompt, chosen and rejected must all be text or all be chat messages. {form}")
    return kept


def _from_hub(spec: DataSpec, split: str) -> list[Row]:
    try:
        found = load_dataset(spec.name, split=split)
    except Exception as error:  # the Hub's client, its HTTP library and datasets each raise their own
        raise DataError(
            f"data.name must be a data set that can be loaded, but '{spec.name}' ({split}) could not be had from this "
            f"machine's cache or the Hub. First reason: {(str(error) or repr(error)).splitlines()[0]} Check name and "
            f"split, or on a machine with internet run `hf download --repo-type dataset {spec.name}`, or give a file: "
            "data=jsonl data.path=PATH."
        ) from error
    return [_check_row(row, f"{spec.name} ({split}), row {i}") for i, row in enumerate(found)]
