"""Answers to prompts with and without an adapter, to see what it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from isaerft_sweep.adapter.load import load_model


def compare(adapter: str, prompts: Sequence[str], max_new_tokens: int, cache: str | None) -> Iterator[tuple[str, str, str]]:
    """For each prompt ``(prompt, answer without the adapter, answer with it)``, by greedy decoding."""
    model, tokenizer = load_model(adapter, cache=cache)
    for prompt in prompts:
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            prompt_text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            prompt_text = prompt
        inputs = tokenizer(str(prompt_text), return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(
            model.device
        )

        def answer(inputs=inputs) -> str:  # type: ignore[no-untyped-def]
            with torch.inference_mode():
                out = model.generate(
                    **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
                )
            return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

        with model.disable_adapter():
            before = answer()
        yield prompt, before, answer()
