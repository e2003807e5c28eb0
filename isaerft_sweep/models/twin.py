"""A small random model of the same family as another: shows without that model's weights whether it can be trained."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

HIDDEN, HEADS = 64, 4
VOCABULARY = 262
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "attention_hidden_size", "n_embd", "n_embed", "d_model", "word_embed_proj_dim", "lru_width"), HIDDEN
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "global_head_dim", "query_pre_attn_scalar"), HIDDEN // HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "ffn_hidden_size"), 2 * HIDDEN),
    **dict.fromkeys(("intermediate_size_mlp", "moe_intermediate_size", "shared_expert_intermediate_size"), HIDDEN // 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_layer"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), HIDDEN // 4),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **{"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
"""Names of widths and counts in model configs, with small values that fit together; the number of layers stays."""


def small_twin(config: Any) -> PreTrainedModel | None:
    """A small random model with the family, layers and other settings of ``config``; None when it cannot be built."""
    text = config.get_text_config()
    settings = text.to_dict()
    accepted = _accepted(type(text))
    small = {
        name: size for name, size in SIZES.items() if settings.get(name) is not None and (name in accepted or not accepted)
    }
    if "qk_rope_head_dim" in settings:  # latent attention rotates only this part of a head and calls it head_dim
        small["head_dim"] = SIZES["qk_rope_head_dim"]
    if {"expand", "num_heads", "head_dim"} <= small.keys() | settings.keys():  # Mamba 2: its heads share the expanded states
        small["head_dim"] = HIDDEN * int(settings["expand"]) // HEADS
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            rest = {name: value for name, value in settings.items() if name not in ("architectures", "quantization_config")}
            twin: PreTrainedModel = AutoModelForCausalLM.from_config(type(text)(**{**rest, **small}))
            ids = torch.zeros(1, 2, dtype=torch.long)
            with torch.no_grad():
                twin.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception:  # these sizes fit together in most families but not in this one
        return None
    twin.requires_grad_(False)
    return twin


def _accepted(config_class: type) -> set[str]:
    """The settings that a config class accepts by name."""
    if dataclasses.is_dataclass(config_class):
        return {field.name for field in dataclasses.fields(config_class)}
    return set(inspect.signature(config_class).parameters) - {"self", "kwargs"}


def count_parameters(config: Any) -> float:
    """Number of parameters of a model with ``config``, without allocating them; infinite if it cannot be determined."""
    try:
        with torch.device("meta"):
            return float(sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters()))
    except Exception:  # a few families read values in their constructors
        return float("inf")
