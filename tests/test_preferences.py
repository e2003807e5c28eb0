"""A row is trained on as TRL reads it, or it is refused or left out with a line: never a text that nobody wrote."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
from trl.experimental.orpo import ORPOTrainer

from isaerft_sweep.controller import preflight
from isaerft_sweep.errors import DataError
from isaerft_sweep.models.random_model import byte_tokenizer
from isaerft_sweep.preferences import check_files
from isaerft_sweep.specs import DataSpec
from isaerft_sweep.trial import data
from isaerft_sweep.trial.data import NO_PROMPT, OTHER_PROMPT, SAME_ANSWERS, TOO_MANY, Pairs, load_pairs

Row = dict[str, Any]
MAX_LENGTH = 200
TOKENIZER = byte_tokenizer()
READS_PARTS = byte_tokenizer()
READS_PARTS.chat_template = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A template that takes parts, and trims each."""
NO_SYSTEM = byte_tokenizer()
NO_SYSTEM.chat_template = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
)


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def assistant(content: Any) -> Row:
    return {"role": "assistant", "content": content}


def parts(*texts: str) -> list[Row]:
    return [{"type": "text", "text": text} for text in texts]


GOOD_TEXT = {"prompt": "good prompt", "chosen": "good", "rejected": "bad"}
GOOD_CHAT = {"prompt": [user("good prompt")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}


def spec_of(folder: Path, rows: list[Any], **more: Any) -> DataSpec:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSpec(name="files", source="files", path=str(path), **more)


def held_out(folder: Path) -> dict[str, Any]:
    path = folder / "held-out.jsonl"
    path.write_text(json.dumps({"prompt": "other", "chosen": "good", "rejected": "bad"}) + "\n")
    return {"eval_path": str(path)}


def trained_on(tmp_path: Path, *rows: Any, tokenizer: Any = TOKENIZER) -> Pairs:
    return load_pairs(spec_of(tmp_path, list(rows), **held_out(tmp_path)), tokenizer, MAX_LENGTH)


class Trl:
    """TRL's own steps on a row, as ORPOTrainer maps them, with nothing of ours."""

    tokenize_row = ORPOTrainer.tokenize_row
    build_tokenized_answer = ORPOTrainer.build_tokenized_answer
    is_encoder_decoder = False

    def __init__(self, tokenizer: Any) -> None:
        self.processing_class, self.max_length = tokenizer, MAX_LENGTH

    def read(self, row: Row) -> Row:
        row = {name: row[name] for name in ("prompt", "chosen", "rejected") if name in row}
        row = maybe_apply_chat_template({**row, **maybe_extract_prompt(row)}, self.processing_class)
        return self.tokenize_row(row)


def joined(row: Row) -> Row:
    """The same text without parts: what the row means to a template that takes only text."""
    return {
        name: [
            {**m, "content": m["content"] if isinstance(m["content"], str) else "".join(p["text"] for p in m["content"])}
            for m in value
        ]
        if isinstance(value, list)
        else value
        for name, value in row.items()
    }


def assert_as_trl(pairs: Pairs, row: Row, tokenizer: Any = TOKENIZER) -> None:
    expected = Trl(tokenizer).read(row)
    found = pairs.train[0]
    for side in ("chosen", "rejected"):
        assert found[f"{side}_ids"] == expected[f"{side}_input_ids"], side
        assert labels(found, side) == expected[f"{side}_labels"], side


def labels(row: Row, side: str) -> list[int]:
    """As TRL marks the answer: -100 where the prompt is."""
    length = row[f"{side}_prompt_length"]
    return [-100] * length + row[f"{side}_ids"][length:]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "", "chosen": "The sea is blue", "rejected": "The sea is green"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"chosen": "The sea is blue", "rejected": "The sea is green"},
        {"chosen": "yes", "rejected": "no"},
        {"prompt": " ", "chosen": " a", "rejected": " b "},
        {"prompt": "Which?", "chosen": [user("Which?"), assistant("a")], "rejected": [user("Which?"), assistant("b")]},
        {"prompt": None, "chosen": [user("Which?"), assistant("a")], "rejected": [user("Which?"), assistant("b")]},
        {"prompt": [user("Which?"), assistant("It ")], "chosen": [assistant("is a")], "rejected": [assistant("is b")]},
        {"prompt": [user("Which?")], "chosen": [assistant("")], "rejected": [assistant("b")]},
    ],
)  # fmt: skip
def test_rows_are_read_as_trl_reads_them(row: Row, tmp_path: Path) -> None:
    pairs = trained_on(tmp_path, row)
    assert pairs.left_out == {}
    assert_as_trl(pairs, row)


def test_an_empty_prompt_is_no_prompt(tmp_path: Path) -> None:
    """Nothing of the answers becomes the prompt, and rows without one are not all held out together."""
    rows = [{"prompt": "", "chosen": f"The sea {i}", "rejected": f"The sky {i}"} for i in range(10)]
    pairs = load_pairs(spec_of(tmp_path, rows, eval_size=3), TOKENIZER, MAX_LENGTH)
    assert (len(pairs.train), len(pairs.evaluation)) == (7, 3)
    for row in [*pairs.train, *pairs.evaluation]:
        assert row["prompt"] == "" and row["chosen_ids"][0] == TOKENIZER.bos_token_id
        assert TOKENIZER.decode(row["chosen_ids"][1:-1]) == row["chosen"]
        assert row["chosen_prompt_length"] == 1, "all of the answer is answer"


PARTS = {
    "prompt": [user(parts("one ", "two"))],
    "chosen": [assistant(parts("good"))],
    "rejected": [assistant(parts("b", "ad"))],
}


def test_parts_of_text_are_that_text(tmp_path: Path) -> None:
    pairs = trained_on(tmp_path, PARTS)
    assert TOKENIZER.decode(pairs.train[0]["chosen_ids"][1:]) == "<|user|>one two<|end|><|assistant|>good<|end|>"
    assert_as_trl(pairs, joined(PARTS))


def test_a_template_that_reads_parts_gets_them(tmp_path: Path) -> None:
    pairs = trained_on(tmp_path, PARTS, tokenizer=READS_PARTS)
    assert "onetwo" in TOKENIZER.decode(pairs.train[0]["chosen_ids"]), "each part trimmed, as the template does"
    assert_as_trl(pairs, PARTS, READS_PARTS)


def test_arguments_of_the_template_are_used(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ tone }}" + str(tokenizer.chat_template)
    row = {**GOOD_CHAT, "chat_template_kwargs": {"tone": "loud"}}
    pairs = trained_on(tmp_path, row, tokenizer=tokenizer)
    assert pairs.train[0]["prompt"] == "loud<|user|>good prompt<|end|><|assistant|>"


PICTURE = [{"type": "image", "url": "x.png"}, {"type": "text", "text": "What is this?"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**GOOD_CHAT, "prompt": [user(PICTURE)]}, "must be of type text"),
        ({**GOOD_CHAT, "chosen": [assistant(None)]}, "content in chosen must be text or parts of text but got None"),
        ({**GOOD_CHAT, "chosen": [assistant(["a"])]}, "content in chosen must be text or parts of text"),
        ({**GOOD_CHAT, "chosen": [assistant([{"type": "text"}])]}, "must be of type text"),
        ({**GOOD_CHAT, "chosen": [assistant(3)]}, "content in chosen must be text or parts of text but got 3"),
        ({**GOOD_CHAT, "chosen": [{"role": None, "content": "a"}]}, "role in chosen must be text"),
        ({**GOOD_CHAT, "prompt": []}, "prompt must not be empty. Leave it out"),
        ({**GOOD_CHAT, "prompt": "Which?"}, "must have a prompt of messages, or answers that begin with the same"),
        ({**GOOD_CHAT, "prompt": None}, "must have a prompt of messages, or answers that begin with the same"),
        ({**GOOD_CHAT, "prompt": [{"role": "system", "content": "s"}]}, "must be of role user, tool or assistant but is of"),
        ({**GOOD_TEXT, "prompt": [user("a")]}, "must all be text or all be chat messages"),
        ({**GOOD_TEXT, "prompt": None}, 'prompt must be text but got null. Give an empty one as ""'),
        ({**GOOD_TEXT, "rejected": ""}, "rejected must not be empty"),
        ({**GOOD_TEXT, "chosen": []}, "chosen must not be empty"),
        ({**GOOD_TEXT, "rejected": None}, "must have rejected but has columns"),
        ({**GOOD_TEXT, "chat_template_kwargs": 3}, "chat_template_kwargs must be an object"),
        ({**GOOD_TEXT, "chosen": "\ud800"}, "cannot be tokenised"),
        (["a"], "a row must be an object"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_line(row: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        trained_on(tmp_path, row)
    assert said in str(error.value) and "pairs.jsonl, line 1" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_template_that_refuses_a_role_names_the_row(tmp_path: Path) -> None:
    system = {**GOOD_CHAT, "prompt": [{"role": "system", "content": "s"}, user("a")]}
    with pytest.raises(DataError, match=r"pairs.jsonl, line 2: .*System role not supported.*model.tokenizer"):
        trained_on(tmp_path, GOOD_CHAT, system, tokenizer=NO_SYSTEM)


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = [
        GOOD_TEXT,
        {**GOOD_TEXT, "rejected": "good"},
        {"chosen": "ab ", "rejected": "cd"},  # TRL would make "ab" the prompt of both
        {**GOOD_TEXT, "prompt": "x" * 300},
    ]
    pairs = trained_on(tmp_path, *rows)
    assert pairs.left_out == {NO_PROMPT: 1, SAME_ANSWERS: 1, data.PROMPT_FILLS: 1} and len(pairs.train) == 1
    said = "1 pairs to train on, 1 held out, 1 left out (no prompt, and answers that begin differently), 1 left out (chosen and "
    assert pairs.summary.startswith(said), pairs.summary


def test_rows_of_a_large_group_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i // 10}", "chosen": f"a{i}", "rejected": "b"} for i in range(40)]
    pairs = load_pairs(spec_of(tmp_path, rows, eval_size=12), TOKENIZER, MAX_LENGTH)
    assert (len(pairs.train), len(pairs.evaluation), pairs.left_out) == (20, 12, {TOO_MANY: 8})


def test_a_text_prompt_that_the_messages_do_not_hold_is_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": text, "chosen": [user("Which?"), assistant("a")], "rejected": [user("Which?"), assistant("b")]}
        for text in ("Which? ", "What?")
    ]
    assert trained_on(tmp_path, *rows).notes[OTHER_PROMPT] == 1


def test_held_out_pairs_are_not_those_trained_on(tmp_path: Path) -> None:
    rows = [{**GOOD_TEXT, "prompt": f"p{i}"} for i in range(6)]
    spec = spec_of(tmp_path, rows)
    (tmp_path / "linked.jsonl").symlink_to(spec.path)
    (tmp_path / "copied.jsonl").write_bytes(Path(str(spec.path)).read_bytes())
    for path in (spec.path, f"{tmp_path}/../{tmp_path.name}/pairs.jsonl", f"{tmp_path}/linked.jsonl"):
        with pytest.raises(DataError, match="must be another file than"):
            load_pairs(DataSpec("files", "files", spec.path, path), TOKENIZER, MAX_LENGTH)
    with pytest.raises(DataError, match="must hold other pairs than are trained on"):
        load_pairs(DataSpec("files", "files", spec.path, f"{tmp_path}/copied.jsonl"), TOKENIZER, MAX_LENGTH)
    (tmp_path / "some.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows[:2], {**GOOD_TEXT, "prompt": "new"}])
    )
    pairs = load_pairs(DataSpec("files", "files", spec.path, f"{tmp_path}/some.jsonl"), TOKENIZER, MAX_LENGTH)
    assert pairs.summary == (
        "6 pairs to train on, 3 held out, 2 of the held-out pairs are also trained on, "
        "none to test on: data.train_size=N would leave some"
    )
    with pytest.raises(DataError, match="must differ from"):
        load_pairs(DataSpec("lab/pairs", train_split="train", eval_split="train"), TOKENIZER, MAX_LENGTH)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{**GOOD_TEXT, "prompt": f"p{i}"} for i in range(60)], "data.eval_size=64 holds out all 60 pairs"),
        ([{**GOOD_TEXT, "rejected": f"r{i}"} for i in range(60)], "all 60 pairs have the same prompt"),
        ([], "the train and evaluation split of files must have at least one pair but is empty"),
    ],
)  # fmt: skip
def test_an_empty_split_says_why(rows: list[Row], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        load_pairs(spec_of(tmp_path, rows, eval_size=64), TOKENIZER, MAX_LENGTH)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("twice.jsonl", b'{"prompt": "p", "chosen": "a", "chosen": "b", "rejected": "c"}', "'chosen' is there twice"),
        ("deep.jsonl", b"[" * 100_000, "not valid JSON"),
        ("latin.jsonl", '{"prompt": "é", "chosen": "a", "rejected": "b"}'.encode("latin-1"), "cannot be read"),
        ("pointer.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ("pointer.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ("torn.parquet", b"PAR1", "cannot be read as Parquet"),
        ("torn.jsonl.gz", b"\x1f\x8b\x08", "cannot be read"),
        ("data.csv", b"a,b", "must end in"),
        ("folder.jsonl", None, "must be a file that exists"),
    ],
)  # fmt: skip
def test_files_are_checked_without_torch(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=said) as error:
        check_files(DataSpec("files", "files", str(path)))
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(DataError, match="must be a file that exists"):
        check_files(DataSpec("files", "files", "~nobody-of-that-name/pairs.jsonl"))


def test_reading_files_loads_no_torch() -> None:
    code = "import sys, isaerft_sweep.preferences; raise SystemExit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "marked.jsonl"
    path.write_text(json.dumps(GOOD_TEXT) + "\n", encoding="utf-8-sig")
    check_files(DataSpec("files", "files", str(path)))


TEXT = st.one_of(
    st.sampled_from(["", " ", "a", "a ", "ab", "The sea", "é", "<|end|>", "{{ x }}", "\u2028", "😀"]), st.text(max_size=6)
)
PART = st.one_of(
    TEXT.map(lambda text: {"type": "text", "text": text}),
    st.sampled_from([{"type": "image"}, {"type": "text"}, {"text": "a"}, {"type": "text", "text": None}, "a", None]),
)
CONTENT = st.one_of(TEXT, TEXT, st.lists(PART, max_size=3), st.sampled_from([None, 3, {}]))
MESSAGE = st.one_of(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["user", "assistant", "system", "tool"]),
        CONTENT,
    ),
    st.sampled_from([{"role": "user"}, {"content": "a"}, {}, "a", {"role": None, "content": "a"}]),
)
MESSAGES = st.one_of(
    st.lists(MESSAGE, max_size=3),
    st.lists(
        st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), TEXT),
        min_size=1,
        max_size=3,
    ),
)
ANSWER = TEXT.map(lambda text: [assistant(text)])


@st.composite
def rows(draw: st.DrawFn) -> Any:
    """Valid and nearly valid rows: text, messages, parts, mixed, with and without prompts, keys left out, other values."""
    form = draw(st.sampled_from(["text", "chat", "begun", "any", "any"]))
    if form == "text":
        row = {name: draw(TEXT) for name in ("prompt", "chosen", "rejected")}
    elif form == "chat":
        row = {"prompt": draw(MESSAGES), "chosen": draw(ANSWER), "rejected": draw(ANSWER)}
    elif form == "begun":
        beginning = draw(MESSAGES)
        row = {"prompt": draw(TEXT), **{side: [*beginning, *draw(ANSWER)] for side in ("chosen", "rejected")}}
    else:
        value = st.one_of(TEXT, MESSAGES, st.sampled_from([None, 3, [], {}, True]))
        row = {name: draw(value) for name in ("prompt", "chosen", "rejected")}
    for name in draw(st.lists(st.sampled_from(["prompt", "prompt", "chosen", "rejected"]), max_size=1)):
        row.pop(name)
    return draw(st.sampled_from([row, row, row, row, {**row, "score": 1.5, "messages": []}]))


@given(rows(), st.sampled_from([TOKENIZER, READS_PARTS, NO_SYSTEM]))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_row_is_refused_left_out_or_trained_on_as_trl_would(row: Any, tokenizer: Any) -> None:
    is_chat = isinstance(row.get("chosen"), list)
    with tempfile.TemporaryDirectory() as folder:
        try:
            pairs = trained_on(Path(folder), row, GOOD_CHAT if is_chat else GOOD_TEXT, tokenizer=tokenizer)
        except DataError as error:
            assert len(str(error).splitlines()) == 1 and "line 1" in str(error)
            return
    left_out = sum(pairs.left_out.values())
    assert len(pairs.train) + left_out == 2, "it is there, or it is counted"
    if not left_out:
        written = {name: value for name, value in row.items() if value is not None}
        assert_as_trl(pairs, written if tokenizer is READS_PARTS else joined(written), tokenizer)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, NO_SYSTEM])
def test_the_trainer_reads_the_same(tokenizer: Any, trial: Callable[..., Any], tmp_path: Path) -> None:
    """ORPOTrainer itself, over a table of the same rows."""
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig

    from isaerft_sweep.models.loading import load

    rows = [{"prompt": "" if i % 2 else f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(8)]
    pairs = load_pairs(spec_of(tmp_path, rows, **held_out(tmp_path)), tokenizer, MAX_LENGTH)
    model = load(trial("tracker=disabled").read_spec().experiment.model, None).model
    args = ORPOConfig(output_dir=str(tmp_path / "trl"), max_length=MAX_LENGTH, bf16=False, use_cpu=True, report_to=[])
    table = ORPOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    ).train_dataset
    assert len(pairs.train) == len(table) == 8
    for mine, theirs in zip(pairs.train, table, strict=True):
        for side in ("chosen", "rejected"):
            assert mine[f"{side}_ids"] == theirs[f"{side}_input_ids"] and labels(mine, side) == theirs[f"{side}_labels"]


def test_many_pairs_are_tokenised_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What one process has tokenised the next one reads; other rows, another template or length are tokenised anew."""
    monkeypatch.setattr(data, "MIN_CACHED_PAIRS", 20)
    monkeypatch.setattr(data, "LOG_INTERVAL_S", -1)
    tokenised: list[Row] = []
    real = data.PairTokenizer.__call__
    monkeypatch.setattr(data.PairTokenizer, "__call__", lambda self, row: (tokenised.append(row), real(self, row))[1])
    rows = [{**GOOD_CHAT, "prompt": [user(f"q{i}")]} for i in range(30)] + [{**GOOD_CHAT, "rejected": GOOD_CHAT["chosen"]}]
    spec, kept = spec_of(tmp_path, rows, eval_size=5), tmp_path / "kept"
    (tmp_path / "other").mkdir()
    fewer = spec_of(tmp_path / "other", rows[1:], eval_size=5)

    def loaded(tokenizer: Any = TOKENIZER, max_length: int = MAX_LENGTH, spec: DataSpec = spec) -> tuple[Pairs, int]:
        tokenised.clear()
        return load_pairs(spec, tokenizer, max_length, None, kept), len(tokenised)

    first, count = loaded()
    assert count == 30 and "tokenised 31 of 31 pairs" in capsys.readouterr().out
    again, count = loaded()
    assert count == 0 and again.summary == first.summary and again.counts == first.counts
    assert again.train[:] == first.train[:] and again.evaluation[:] == first.evaluation[:]
    assert loaded(NO_SYSTEM)[1] == loaded(max_length=150)[1] == loaded(spec=fewer)[1] + 1 == 30
    for entry in kept.glob("*/train/*.arrow"):
        entry.write_bytes(b"torn")
    assert loaded(max_length=150)[1] == 30, "a damaged entry is made again"
    loaded(max_length=140), loaded(max_length=130)
    assert len([path for path in kept.iterdir() if path.is_dir() and not path.name.startswith(".")]) == 4
    (tmp_path / "file").touch()
    assert len(load_pairs(spec, TOKENIZER, MAX_LENGTH, None, tmp_path / "file" / "kept").train) == 25, "costs only the time"


def test_the_check_shows_its_progress(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('progress: tokenised 1 of 2 pairs', file=sys.stderr, flush=True); print('noise', file=sys.stderr); print(sys.stdin.read())"
    done = preflight._run([sys.executable, "-c", code], "given")
    assert (done.returncode, done.stdout) == (0, "given\n")
    assert capfd.readouterr().err == "tokenised 1 of 2 pairs\n" and "noise" in done.stderr
