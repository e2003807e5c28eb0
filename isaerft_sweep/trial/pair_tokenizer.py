"""Preference pairs as token ids.

The rules are those of TRL's ORPOTrainer (the tests compare every token): the chat template turns messages into text, prompt
and answer are tokenised together (a tokenizer may merge the prompt's last token with the answer's first), BOS comes first,
EOS last, and an answer is cut where the sequence reaches ``max_length``.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from isaerft_sweep.preferences import ANSWERS, Row

TEXTS = ("prompt", *ANSWERS)


@dataclass(frozen=True)
class TokenizedAnswer:
    """A prompt with one answer: token ids; the first ``prompt_length`` belong to the prompt."""

    ids: list[int]
    prompt_length: int


class PairTokenizer:
    """Tokenises the pairs of one data set."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self._cached: dict[str, list[int]] = {}
        self._takes_parts: bool | None = None

    def __call__(self, row: Row) -> Row:
        """Texts, token ids and prompt lengths of a row. Raises ValueError when the prompt's tokens depend on the answer."""
        texts = self.texts(row)
        answers = {name: self._answer(texts["prompt"], texts[name]) for name in ANSWERS}
        _check_prompts(*answers.values())
        sides = ((name, self._framed(answer)) for name, answer in answers.items())
        tokens = {f"{name}_{field}": value for name, side in sides for field, value in vars(side).items()}
        return {**texts, **tokens}

    def texts(self, row: Row) -> Row:
        """Prompt and answers as text, by the chat template where they are messages."""
        row = with_prompt(row)
        if isinstance(row["chosen"], str):
            return {name: row[name] for name in TEXTS}
        if not self.takes_parts:
            row = {name: [joined(m) for m in value] if name in TEXTS else value for name, value in row.items()}
        return self._rendered(row)

    def prepare(self, texts: Sequence[Row]) -> None:
        """Tokenise all texts that the next rows need in one call."""
        needed = dict.fromkeys(t for row in texts for t in (row["prompt"], *(row["prompt"] + row[a] for a in ANSWERS)))
        try:
            ids = self.tokenizer(list(needed), add_special_tokens=False)["input_ids"] if needed else []
        except Exception:  # the bad row raises it again, with its place
            ids = []
        self._cached = dict(zip(needed, ids, strict=False))

    @property
    def takes_parts(self) -> bool:
        """Whether the chat template reads content as a list of parts, as those of vision models do."""
        if self._takes_parts is None:
            parts = [{"type": "text", "text": "part1"}, {"type": "text", "text": "part2"}]
            try:
                probe = self._template([{"role": role, "content": parts} for role in ("user", "assistant")], {})
                self._takes_parts = len(re.findall(r"part1\s*part2", probe)) == 2
            except Exception:  # a template can raise anything
                self._takes_parts = False
        return self._takes_parts

    def _rendered(self, row: Row) -> Row:
        """The texts of a conversation. The prompt ends where an answer begins: after the template's generation prompt, or
        inside an assistant message that the answer continues."""
        options, role = row.get("chat_template_kwargs") or {}, row["prompt"][-1]["role"]
        if role not in ("user", "tool", "assistant"):
            raise ValueError(f"the prompt's last message must be of role user, tool or assistant but is of {role!r}")
        continued = {"continue_final_message": role == "assistant", "add_generation_prompt": role != "assistant"}
        prompt = self._template(row["prompt"], {**options, **continued})
        texts = {name: self._template(row["prompt"] + row[name], options) for name in ANSWERS}
        # a template may append more to a prompt (an opened <think>) than it writes before an answer
        prompt = os.path.commonprefix([prompt, *texts.values()])  # noqa: RUF071  (of texts, not of paths)
        return {"prompt": prompt, **{name: text[len(prompt) :] for name, text in texts.items()}}

    def _template(self, messages: list[Row], options: Row) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def _ids(self, text: str) -> list[int]:
        cached = self._cached.get(text)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if cached is None else cached

    def _answer(self, prompt: str, answer: str) -> TokenizedAnswer:
        """Prompt and answer tokenised together, and the number of prompt tokens."""
        ids, prompt_ids = self._ids(prompt + answer), self._ids(prompt)
        if len(ids) < len(prompt_ids):
            raise ValueError("the tokenizer makes fewer tokens of prompt and answer together than of the prompt alone")
        merged = ids[: len(prompt_ids)] != prompt_ids
        return TokenizedAnswer(list(ids), len(prompt_ids) - merged)

    def _framed(self, answer: TokenizedAnswer) -> TokenizedAnswer:
        """Add BOS and EOS where missing, then cut to ``max_length``, but not into the prompt."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids, length = answer.ids, answer.prompt_length
        if len(ids) == length or ids[-1] != eos:
            ids = [*ids, eos]
        if bos is not None and (length == 0 or ids[0] != bos):
            ids, length = [bos, *ids], length + 1
        return TokenizedAnswer(ids[: max(self.max_length, length)], length)


def _check_prompts(chosen: TokenizedAnswer, rejected: TokenizedAnswer) -> None:
    """Raise ValueError unless both prompts have the same tokens, except for a last one that is merged with the answer."""
    prompts = [answer.ids[: answer.prompt_length] for answer in (chosen, rejected)]
    different = sum(a != b for a, b in zip(*prompts, strict=False))
    if different > 1 or abs(chosen.prompt_length - rejected.prompt_length) > 1:
        raise ValueError("the prompt's tokens must not depend on the answer, but the tokenizer merges them with it")


def with_prompt(row: Row) -> Row:
    """The row with a prompt of the same type as its answers: if missing, or text with message answers, their common prefix.

    As in TRL: by message or by character; a space before the first difference belongs to the answers.
    """
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if prompt is not None and isinstance(prompt, str) == isinstance(chosen, str):
        return row
    shared = min(len(chosen), len(rejected))
    different = next((i for i in range(shared) if chosen[i] != rejected[i]), None)
    end = shared - 1 if different is None else different - (chosen[different - 1] == " ")
    return {**row, "prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def joined(message: Row) -> Row:
    """A message with its text parts concatenated, as templates that read parts render them."""
    content = message["content"]
    return message if isinstance(content, str) else {**message, "content": "".join(part["text"] for part in content)}
