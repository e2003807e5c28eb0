"""The control without an adapter: a system prompt before every prompt, and a model that stays as it is."""

from __future__ import annotations

import os.path

import peft
from transformers import PreTrainedTokenizerBase

from isaerft_sweep.errors import DataError, ModelError

QUESTION, SYSTEM = "\u2042question\u2042", "\u2043system\u2043"
"""Messages of the conversations that are compared: nothing that a template writes begins or ends like them."""


class SystemPrompt:
    """Puts a system prompt into prompts that the chat template has already rendered.

    Where, and what the template writes around it, follows from one conversation rendered with and without it. A template
    that takes no system message gets the text at the start of the first user message. Before prompts that were written as
    text, the text stands in a paragraph of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text
        self._start, self._replaced, self._inserted = "", "", f"{text}\n\n"
        if tokenizer.chat_template:
            without, with_mark, with_text = (self._rendered(system) for system in (None, SYSTEM, text))
            before = os.path.commonprefix([without, with_mark])  # noqa: RUF071  (of texts, not of paths)
            rest, rest_with = without[len(before) :], with_mark[len(before) :]
            after = len(os.path.commonprefix([rest[::-1], rest_with[::-1]]))  # noqa: RUF071
            self._start, self._replaced = before, rest[: len(rest) - after]
            self._inserted = with_text[len(before) : len(with_text) - after]

    def before(self, prompt: str) -> str:
        """The prompt with the system prompt: one that the chat template rendered, or one written as text.

        Raises DataError where the conversation has a system message of its own in place of the template's default one.
        """
        start = self._start + self._replaced
        if prompt.startswith(start):
            return self._start + self._inserted + prompt[len(start) :]
        if self._start and prompt.startswith(self._start):
            raise DataError(
                "adapter.system_prompt must go with conversations without a system message where the chat template has a "
                f"default one, but this one begins with {prompt[:80]!r}. Leave these rows out."
            )
        return f"{self.text}\n\n{prompt}"

    def ids_before(self, prompt: str, ids: list[int]) -> list[int]:
        """Token ids of the prompt with the system prompt. Raises DataError when the tokenizer merges both.

        ``ids``: those of the prompt as the trials have it, which may begin with BOS and lack a last token that the tokenizer
        merges with the answer.
        """
        plain, longer = self._ids(prompt), self._ids(self.before(prompt))
        bos = ids[:1] if len(ids) and ids[0] == self.tokenizer.bos_token_id else []
        if bos and plain[:1] != bos:
            plain, longer = bos + plain, (longer if longer[:1] == bos else bos + longer)
        missing = len(plain) - len(ids)
        if missing not in (0, 1) or plain[len(plain) - missing :] != longer[len(longer) - missing :]:
            raise DataError(
                f"adapter.system_prompt must not change the tokens of prompts behind it, but it does for {prompt[:80]!r}. "
                "End it with a full stop."
            )
        return longer[: len(longer) - missing]

    def ids_before_text(self, ids: list[int]) -> tuple[list[int], int]:
        """Token ids of a text behind the system prompt, and the number of tokens before its own.

        ``ids``: the text's, which may begin with BOS.
        """
        before = self._ids(f"{self.text}\n\n")
        bos = ids[:1] if len(ids) and ids[0] == self.tokenizer.bos_token_id else []
        return [*bos, *before, *ids[len(bos) :]], len(before)

    def _rendered(self, system: str | None) -> str:
        user = {"role": "user", "content": QUESTION}
        if system is None:
            return self._template([user])
        try:
            text = self._template([{"role": "system", "content": system}, user])
            if system.strip() in text:
                return text
        except Exception:  # a template can raise anything, and many do for a system message
            pass
        return self._template([{**user, "content": f"{system}\n\n{QUESTION}"}])

    def _template(self, messages: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def check_changes_model(model: peft.PeftModel) -> None:
    """Raise ModelError for the adapter that is a system prompt: there is nothing to put into a model."""
    for config in model.peft_config.values():
        if text := getattr(config, "system_prompt", None):
            raise ModelError(
                f"an export must be of an adapter that changes the model, but this one is a text: {text!r}. Use it as the "
                "system prompt of the base model."
            )
