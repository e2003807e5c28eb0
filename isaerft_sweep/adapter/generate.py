"""Answers to prompts with and without an adapter, for comparison.

The orchestrator has no torch, so it runs ``python -m isaerft_sweep.adapter.generate < request.json``. The request is a JSON
object with the arguments of ``side_by_side``; the output is one JSON line, ``{"ok": rows}`` or ``{"error": message}``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from isaerft_sweep.adapter.load import load_model
from isaerft_sweep.adapter.system_prompt import SystemPrompt
from isaerft_sweep.errors import IsaerftError


def compare(adapter: str, prompts: Sequence[str], max_new_tokens: int, cache: str | None) -> Iterator[tuple[str, str, str]]:
    """For each prompt ``(prompt, answer without the adapter, answer with it)``, by greedy decoding.

    Args:
        adapter: its folder, or a repository of the Hub.
        prompts: what a user says.
        max_new_tokens: longest answer.
        cache: folder of converted models; None: the user's cache folder.
    """
    model, tokenizer = load_model(adapter, cache=cache)
    text = getattr(model.peft_config["default"], "system_prompt", None)
    system = SystemPrompt(tokenizer, text) if text else None
    for prompt in prompts:
        with model.disable_adapter():
            before = answer(model, tokenizer, prompt, max_new_tokens)
        yield prompt, before, answer(model, tokenizer, prompt, max_new_tokens, system)


def side_by_side(adapters: Sequence[str], prompts: Sequence[str], max_new_tokens: int, cache: str | None) -> list[list[str]]:
    """For each prompt a row: the prompt, the answer of the first adapter's base model, and each adapter's answer.

    One model is in memory at a time; the adapters may have different base models.

    Args:
        adapters: folders or Hub repositories.
        prompts: user messages.
        max_new_tokens: maximum length of an answer.
        cache: folder of converted models; None: the user's cache folder.
    """
    columns: list[list[str]] = []
    for adapter in adapters:
        compared = list(zip(*compare(adapter, prompts, max_new_tokens, cache), strict=True))
        columns += [list(column) for column in (compared if not columns else compared[2:])]
    return [list(row) for row in zip(*columns, strict=True)]


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, system: SystemPrompt | None = None
) -> str:
    """The model's answer to one prompt, by greedy decoding, in its chat template if it has one.

    Args:
        model: the model, with or without an adapter.
        tokenizer: its tokenizer.
        prompt: a user message.
        max_new_tokens: maximum length of the answer.
        system: the system prompt; None: none.
    """
    chat = bool(tokenizer.chat_template)
    text = prompt
    if chat:
        messages = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    text = system.before(text) if system else text
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    new = greedy(model, ids, max_new_tokens, tokenizer.pad_token_id)
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], max_new_tokens: int, pad: int | None) -> list[int]:
    """Token ids of the most likely continuation, token by token, the end token included.

    Args:
        model: any causal language model of transformers.
        prompt: token ids.
        max_new_tokens: longest continuation.
        pad: id of the padding token.
    """
    ids = torch.tensor([prompt], device=model.device)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad}
    out: list[int] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    return out[len(prompt) :]


def main() -> int:
    """Answer one request."""
    request = json.load(sys.stdin)
    try:
        result: dict[str, Any] = {"ok": side_by_side(**request)}
    except IsaerftError as error:
        result = {"error": str(error)}
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
