"""Preference pairs for a trial: read, split by prompt, tokenised, and filtered; unusable pairs are counted by reason."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, concatenate_datasets, disable_progress_bars, load_dataset
from transformers import PreTrainedTokenizerBase

from isaerft_sweep.errors import DataError
from isaerft_sweep.paths import asset
from isaerft_sweep.preferences import ANSWERS, Row, Written, check_row, check_same_format, data_files, read_pairs
from isaerft_sweep.spec_fields import canonical_json
from isaerft_sweep.specs import DataSpec
from isaerft_sweep.trial.kept_tokens import Tokenised, kept_tokens
from isaerft_sweep.trial.pair_tokenizer import TEXTS, PairTokenizer, joined, with_prompt

PROMPT_FILLS = "prompt fills max_length"
SAME_ANSWERS = "chosen and rejected are the same"
NO_PROMPT = "no prompt, and answers that begin differently"
UNTESTED = "none to test on: data.train_size=N would leave some"
TOO_MANY = "more answers to a held-out prompt than data.eval_size has room for"
OTHER_PROMPT = "with a text prompt that their messages do not hold: the messages count, as in TRL"
ALSO_TRAINED = "of the held-out pairs are also trained on"

FEATURES = Features(
    {name: Value("string") for name in TEXTS}
    | {f"{name}_ids": List(Value("int32")) for name in ANSWERS}
    | {f"{name}_prompt_length": Value("int32") for name in ANSWERS}
)
"""A tokenised pair: its texts, and for each answer the token ids of prompt + answer and the number of prompt tokens."""
SPLITS = ("train", "evaluation", "test")
FORMAT = 3
"""Version of the token cache; raise it when the tokenisation changes."""
MIN_CACHED_PAIRS = 2000
"""From this many pairs on, tokenising takes seconds and the tokens are cached."""
CHUNK = 512
"""Pairs per call of the tokenizer."""
LOG_INTERVAL_S = 10.0
"""Seconds between two lines of progress."""

Report = Callable[[int, int], None]
"""Called with the numbers of tokenised pairs and of all pairs."""

disable_progress_bars()


@dataclass(frozen=True)
class Pairs:
    """Tokenised pairs for training, evaluation and test; numbers of pairs left out, by reason, and of pairs cut.

    ``notes``: other remarks for the user, with the number of pairs that each concerns.
    """

    train: Dataset
    evaluation: Dataset
    test: Dataset
    """Pairs that no ranking sees; may be empty."""
    left_out: dict[str, int]
    truncated: int
    notes: dict[str, int]
    untested: bool = False
    """Whether no pair was left for the test although none was unwanted."""

    @property
    def dropped(self) -> int:
        """Pairs whose prompt leaves no room for an answer."""
        return self.left_out.get(PROMPT_FILLS, 0)

    @property
    def counts(self) -> dict[str, Any]:
        """Counts for the trial's status and its card."""
        pairs = {"trained": len(self.train), "held_out": len(self.evaluation), "test": len(self.test), "cut": self.truncated}
        return {**pairs, "left_out": self.left_out, "notes": self.notes}

    @property
    def summary(self) -> str:
        phrases = [f"{len(self.train)} pairs to train on", f"{len(self.evaluation)} held out"]
        phrases += [f"{len(self.test)} to test on"] if len(self.test) else []
        phrases += [f"{count} left out ({reason})" for reason, count in self.left_out.items() if count]
        phrases += [f"{self.truncated} cut at max_length"] if self.truncated else []
        phrases += [f"{count} {note}" for note, count in self.notes.items() if count]
        phrases += [UNTESTED] if self.untested else []
        return ", ".join(phrases)


def largest_token(pairs: Pairs) -> int:
    """The largest token id among all pairs."""
    return max(int(pc.max(pc.list_flatten(column)).as_py()) for column in _sequences(pairs) if len(column))


def longest_sequence(pairs: Pairs) -> int:
    """Tokens of the longest prompt + answer."""
    return max(int(pc.max(pc.list_value_length(column)).as_py()) for column in _sequences(pairs) if len(column))


def _sequences(pairs: Pairs) -> list[Any]:
    """Arrow columns of token ids."""
    return [data.data.column(f"{side}_ids") for data in (pairs.train, pairs.evaluation, pairs.test) for side in ANSWERS]


def load_pairs(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    report: Report | None = None,
    token_cache: Path | None = None,
) -> Pairs:
    """Read, check, split, filter and tokenise. Raises DataError when no usable pair is left.

    Args:
        spec: where the pairs are.
        tokenizer: the model's tokenizer.
        max_length: maximum tokens of a prompt + answer.
        report: called with the progress; None: print a line every ``LOG_INTERVAL_S``.
        token_cache: folder that caches the tokens of large data sets for other processes; None: no cache.
    """
    left_out, notes = Counter[str](), Counter[str]()
    splits = dict(zip(SPLITS, _read(spec, left_out, notes), strict=True))

    def make() -> Tokenised:
        return _tokenised(splits, PairTokenizer(tokenizer, max_length), spec, report or Progress())

    if token_cache is not None and sum(map(len, splits.values())) >= MIN_CACHED_PAIRS:
        tokenised = kept_tokens(token_cache, _key(splits, tokenizer, max_length), make)
    else:
        tokenised = make()
    counts = dict(left_out + Counter(tokenised.left_out))
    train, evaluation, test = (tokenised.sets[name] for name in SPLITS)
    untested = not len(test) and spec.test_size is None and spec.source != "hub"
    return Pairs(train, evaluation, test, counts, tokenised.truncated, dict(notes), untested)


def _tokenised(splits: dict[str, list[Written]], tokenize: PairTokenizer, spec: DataSpec, report: Report) -> Tokenised:
    left_out: Counter[str] = Counter()
    total, done, sets, truncated = sum(map(len, splits.values())), 0, {}, 0
    for name, rows in splits.items():
        left_out_here: Counter[str] = Counter()
        chunks = []
        for start in range(0, len(rows), CHUNK):
            usable = list(_usable(tokenize, rows[start : start + CHUNK], left_out_here))
            truncated += sum(any(len(row[f"{side}_ids"]) >= tokenize.max_length for side in ANSWERS) for row in usable)
            columns = {column: [row[column] for row in usable] for column in FEATURES}
            chunks.append(Dataset.from_dict(columns, features=FEATURES))
            done += len(rows[start : start + CHUNK])
            report(done, total)
        sets[name] = (
            concatenate_datasets(chunks) if chunks else Dataset.from_dict({c: [] for c in FEATURES}, features=FEATURES)
        )
        if not len(sets[name]) and name != "test":
            where = f"the {name} split of {spec.name}"
            raise DataError(_nothing_left(where, left_out_here, len(rows), tokenize.max_length))
        left_out += left_out_here
    return Tokenised(sets, dict(left_out), truncated)


def _key(splits: dict[str, list[Written]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> str | None:
    """A hash of everything that determines the tokens; None if the tokenizer cannot be serialised."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    digest = hashlib.sha256(backend.to_str().encode())
    settings = [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id]
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "isaerft-sweep")]
    digest.update(canonical_json([settings, versions, max_length, FORMAT]).encode())
    for name, rows in splits.items():
        digest.update(name.encode())
        for row in rows:
            digest.update(canonical_json(row.row).encode())
    return digest.hexdigest()[:32]


class Progress:
    """Prints how many pairs are tokenised, at most every ``LOG_INTERVAL_S``. ``prefix``: start of each line."""

    def __init__(self, stream: TextIO | None = None, prefix: str = "") -> None:
        self._stream, self._prefix, self._logged_s = stream, prefix, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._logged_s > LOG_INTERVAL_S:
            self._logged_s = time.monotonic()
            print(f"{self._prefix}tokenised {done} of {total} pairs", file=self._stream, flush=True)


def _usable(tokenize: PairTokenizer, rows: Sequence[Written], left_out: Counter[str]) -> Iterator[Row]:
    """Tokenised rows, without those that carry no preference."""
    texts = [_tried(row, tokenize.texts) for row in rows]
    tokenize.prepare(texts)
    for row, text in zip(rows, texts, strict=True):
        if text["chosen"] == text["rejected"]:
            left_out[SAME_ANSWERS] += 1
            continue
        tokens = _tried(replace(row, row=text), tokenize)
        # the first token of a sequence is never predicted
        if any(len(tokens[f"{side}_ids"]) <= max(1, tokens[f"{side}_prompt_length"]) for side in ANSWERS):
            left_out[PROMPT_FILLS] += 1
            continue
        yield tokens


def _tried(row: Written, convert: Callable[[Row], Row]) -> Row:
    """``convert`` applied to the row. Raises DataError, with the row's place, when it fails."""
    try:
        return convert(row.row)
    except Exception as error:  # a chat template can raise anything
        reason = (str(error) or repr(error)).splitlines()[0]
        raise DataError(
            f"{row.where}: the row cannot be tokenised ({reason}). Fix or remove it, or choose a tokenizer whose chat "
            f"template accepts it: model.tokenizer=NAME. The row: {json.dumps(row.row)[:300]}"
        ) from error


def _nothing_left(where: str, left_out: Counter[str], rows: int, max_length: int) -> str:
    if left_out[PROMPT_FILLS] == rows:
        return (
            f"no pair of {where} fits: every prompt fills orpo.max_length={max_length} tokens and leaves no room for an "
            "answer. Raise orpo.max_length."
        )
    reasons = ", ".join(f"{count} of {rows}: {reason}" for reason, count in left_out.items())
    return f"{where} must have at least one pair that can be trained on but has none ({reasons})."


def _read(spec: DataSpec, left_out: Counter[str], notes: Counter[str]) -> tuple[list[Written], ...]:
    """Rows with prompts, for training, for evaluation and for the test."""

    def prompted(rows: Iterable[Written]) -> list[Written]:
        return list(_with_prompts(rows, left_out, notes))

    if spec.source == "hub":
        if spec.test_split in (spec.train_split, spec.eval_split):
            raise DataError(f"data.test_split must differ from the other splits but is '{spec.test_split}' too.")
        if spec.train_split == spec.eval_split:
            raise DataError(f"data.eval_split must differ from data.train_split but both are '{spec.eval_split}'.")
        train, evaluation = (prompted(_from_hub(spec, split)) for split in (spec.train_split, spec.eval_split))
        test = prompted(_from_hub(spec, spec.test_split)) if spec.test_split else []
        return *_apart(spec, train, evaluation, notes), _unseen(spec, test, train, evaluation)
    path, eval_path = (asset("data", "courtesy.jsonl"), None) if spec.source == "builtin" else data_files(spec)
    rows = prompted(read_pairs(path))
    if eval_path:
        held_out = prompted(read_pairs(eval_path, "data.eval_path"))
        train, evaluation = _apart(spec, rows[: spec.train_size], held_out[: spec.eval_size], notes)
        return train, evaluation, _unseen(spec, held_out[len(evaluation) :], train, evaluation)
    train, evaluation = split_by_prompt(rows, spec.eval_size or max(1, len(rows) // 10), spec.seed)
    if not train or not evaluation:
        raise DataError(_empty(spec, "train" if rows else "train and evaluation", rows, left_out))
    left_out[TOO_MANY] += max(0, len(evaluation) - spec.eval_size) if spec.eval_size else 0
    trained, held_out = train[: spec.train_size], evaluation[: spec.eval_size]
    return trained, held_out, _unseen(spec, train[len(trained) :], trained, held_out)


def _unseen(spec: DataSpec, left: list[Written], train: list[Written], evaluation: list[Written]) -> list[Written]:
    """The test pairs: of those that are ``left``, the first whose prompts are neither trained on nor held out."""
    seen = {_group(row) for row in (*train, *evaluation)}
    unseen = [row for row in left if _group(row) not in seen]
    if spec.test_split:
        return unseen
    size = len(evaluation) if spec.test_size is None else spec.test_size
    if len(unseen) >= size:
        return unseen[:size]
    if spec.test_size is None:
        return []
    raise DataError(
        f"data.test_size must be at most the pairs whose prompts are neither trained on nor held out, {len(unseen)} of "
        f"{spec.name}, but got {size}. Leave some out of the training: data.train_size=N."
    )


def _with_prompts(rows: Iterable[Written], left_out: Counter[str], notes: Counter[str]) -> Iterator[Written]:
    """The rows, each with an explicit prompt where it has one."""
    for row in rows:
        chosen, rejected = (row.row[name] for name in ANSWERS)
        prompt = row.row.get("prompt")
        if (prompt is None or row.is_chat != isinstance(prompt, list)) and chosen[0] != rejected[0]:
            if row.is_chat:
                raise DataError(
                    f"{row.where}: a row of messages must have a prompt of messages, or answers that begin with the same "
                    f"ones, but chosen begins with {str(chosen[0])[:80]!r} and rejected with {str(rejected[0])[:80]!r}."
                )
            if chosen.endswith(" "):  # TRL would use chosen as the prompt of both
                left_out[NO_PROMPT] += 1
                continue
        prompted = with_prompt(row.row)
        if row.is_chat and isinstance(prompt, str):
            texts = [str(joined(message)["content"]).strip() for message in prompted["prompt"]]
            notes[OTHER_PROMPT] += prompt.strip() not in texts
        yield replace(row, row=prompted)


def _apart(
    spec: DataSpec, train: list[Written], evaluation: list[Written], notes: Counter[str]
) -> tuple[list[Written], list[Written]]:
    """Training and held-out rows from different sources. Raises DataError when both hold the same pairs."""
    for name, rows in (("train", train), ("evaluation", evaluation)):
        if not rows:
            raise DataError(_empty(spec, name, rows, Counter()))
    trained, held_out = ([json.dumps(row.row, sort_keys=True) for row in rows] for rows in (train, evaluation))
    trained_set = set(trained)
    if trained_set == set(held_out):
        where = "data.eval_split" if spec.source == "hub" else "data.eval_path"
        raise DataError(
            f"{where} must hold other pairs than are trained on but those of {spec.name} are the same: trials would be "
            "judged by what they were trained on. Give other pairs, or let data.eval_size hold some out."
        )
    notes[ALSO_TRAINED] += sum(row in trained_set for row in held_out)
    return train, evaluation


def _empty(spec: DataSpec, split: str, rows: Sequence[Written], left_out: Counter[str]) -> str:
    problem = f"the {split} split of {spec.name} must have at least one pair but is empty"
    if spec.source == "hub":
        slices = f"data.train_split (now {spec.train_split}), data.eval_split (now {spec.eval_split})"
        return f"{problem}. Choose other slices: {slices}."
    if rows and len({_group(row) for row in rows}) == 1 < len(rows):
        problem += f": all {len(rows)} pairs have the same prompt, and a prompt is trained on or held out with all its pairs"
    elif rows:
        problem += f": data.eval_size={spec.eval_size or 1} holds out all {len(rows)} pairs"
    left = "".join(f" ({count} left out: {reason})" for reason, count in left_out.items() if count)
    return f"{problem}{left}. Give more rows, or a smaller data.eval_size, or a separate file: data.eval_path=PATH."


def split_by_prompt(rows: list[Written], eval_size: int, seed: int) -> tuple[list[Written], list[Written]]:
    """Shuffle, then hold out whole prompts until ``eval_size`` pairs are reached: no prompt is on both sides."""
    groups: dict[str, list[Written]] = {}
    for row in rows:
        groups.setdefault(_group(row), []).append(row)
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    train: list[Written] = []
    evaluation: list[Written] = []
    for key in keys:
        (evaluation if len(evaluation) < eval_size else train).extend(groups[key])
    random.Random(seed).shuffle(train)
    return train, evaluation


def _group(row: Written) -> str:
    """The key of rows that stay on one side: the prompt, or the whole row if it has none."""
    prompt = row.row["prompt"]
    return json.dumps(prompt if prompt else [row.row[name] for name in TEXTS])


def _from_hub(spec: DataSpec, split: str) -> Iterator[Written]:
    try:
        rows = load_dataset(spec.name, split=split)
    except Exception as error:  # the Hub's client, its HTTP library and datasets raise different types
        raise DataError(
            f"data.name must be a data set that can be loaded, but '{spec.name}' ({split}) could not be loaded from this "
            f"machine's cache or the Hub. First reason: {(str(error) or repr(error)).splitlines()[0]} Check name and "
            f"split, or on a machine with internet run `hf download --repo-type dataset {spec.name}`, or give a file: "
            "data=jsonl data.path=PATH."
        ) from error
    located = ((f"{spec.name} ({split}), row {i}", row) for i, row in enumerate(rows))
    return check_same_format(Written(where, check_row(row, where)) for where, row in located)
