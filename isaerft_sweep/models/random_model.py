"""Tiny models with random weights and a byte tokenizer, created locally: the same code paths without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from isaerft_sweep.errors import ModelError, suggest
from isaerft_sweep.journal.atomic_files import create_once
from isaerft_sweep.specs import ModelSpec

LAYERS, HIDDEN = 4, 64
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]

_SIZES: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
_KV: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": HIDDEN // 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, **_KV},
    "gemma2": {**_SIZES, **_KV, "query_pre_attn_scalar": HIDDEN // 4, "sliding_window": 64},
    "gemma3_text": {**_SIZES, **_KV, "query_pre_attn_scalar": HIDDEN // 4, "sliding_window": 64},
    "qwen2": {**_SIZES, "num_key_value_heads": 2},
    "qwen3": {**_SIZES, **_KV},
    "gpt_neox": _SIZES,
}


def made_folder(spec: ModelSpec, cache: Path) -> Path:
    """The folder with the tiny model of ``spec.architecture``; created at first use."""
    architecture = spec.architecture or "llama"
    if architecture not in ARCHITECTURES:
        raise ModelError(f"model.architecture is unknown: '{architecture}'." + suggest(architecture, ARCHITECTURES))
    return create_once(cache / "models" / f"tiny-{architecture}", lambda folder: make(architecture, folder))


def make(architecture: str, folder: Path, seed: int = 0) -> None:
    """Write a random model with 4 layers and hidden size 64, and a byte-level tokenizer, into ``folder``."""
    tokenizer = byte_tokenizer()
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture], **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and a chat template."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[3:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
