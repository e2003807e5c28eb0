"""How a trial's batch runs through the model: log-probabilities of the tokens that its loss reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from isaerft_sweep.adapter.architecture import decoder_name
from isaerft_sweep.trial.forward.batch_layout import (
    Batch,
    Layout,
    TokenLogps,
    one_row_per_sequence,
    shared_prefix_rows,
    unique_read_positions,
)
from isaerft_sweep.trial.forward.frozen_prefix import CALL_TOKENS
from isaerft_sweep.trial.forward.head import model_head, token_logps
from isaerft_sweep.trial.forward.upper_layers import UpperLayers
from isaerft_sweep.trial.length_groups import length_groups

CALL_FLOPS = {"cpu": 2e9, "cuda": 2e12}
"""Floating-point operations that a device does in the fixed overhead of one forward pass: a few milliseconds."""

PROBE_ERROR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative error of the states with shared prompts."""

WINDOWS = (
    "sliding_window",
    "window_size",
    "attention_window_size",
    "attention_window",
    "local_attention",
    "attention_chunk_size",
)
"""Names of attention windows in model configs: in a row with two answers a window would cover other tokens."""

Prepare = Callable[[list[int], int], None]
"""Called with the rows and the padded width of each decoder call, before the call."""


@dataclass(frozen=True)
class ForwardStrategy:
    """How a batch runs through a trial's model.

    ``above``: replaces the frozen layers up to the hook point by their cached output. ``share_prompts``: both answers of a
    pair follow one prompt. ``lean``: logits are computed only where the loss reads them; else the model's own forward pass
    runs. ``base``: the model without an adapter if the trial can be co-batched, else None.
    """

    above: UpperLayers | None = None
    share_prompts: bool = False
    lean: bool = True
    base: PreTrainedModel | None = None

    def forward(self, model: PreTrainedModel, batch: Batch) -> TokenLogps:
        """Outputs for each token that the batch reads, sequence by sequence; ``model``: the trial's, with its adapter."""
        if not self.lean:
            return plain_logps(model, batch)
        layout = make_layout(batch, self.share_prompts)
        return TokenLogps(*read_logps(model, batch, layout, self.prepare(batch, layout)))

    def prepare(self, batch: Batch, layout: Layout) -> Prepare | None:
        """Gives each decoder call its rows of the cached output; None without ``above``."""
        if self.above is None:
            return None
        above, hidden = self.above, layout.arranged(self.above.hidden(batch.ids, batch.mask), batch.mask)
        return lambda rows, width: above.set_hidden(hidden[rows, :width])


def plain_logps(model: PreTrainedModel, batch: Batch) -> TokenLogps:
    """As ``ForwardStrategy.forward``, by the model's own forward pass, with the router's loss if the config enables it."""
    outputs = model(batch.ids, attention_mask=batch.mask, use_cache=False)
    logits = outputs.logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    router = outputs.aux_loss if getattr(model.config, "output_router_logits", False) else None
    return TokenLogps(logps[batch.read], logits.mean(-1)[batch.read], router)


def make_layout(batch: Batch, share_prompts: bool) -> Layout:
    """The layout of the batch in the decoder's rows."""
    return shared_prefix_rows(batch) if share_prompts else one_row_per_sequence(batch)


def read_logps(
    model: PreTrainedModel, batch: Batch, layout: Layout, prepare: Prepare | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p and mean logit of every token that the batch reads, both float32 [n].

    Args:
        model: with the trial's adapter, or for co-batched trials with all of them.
        batch: the token sequences.
        layout: their rows in the decoder.
        prepare: called before each decoder call.
    """
    hidden = read_states(model, batch, layout, prepare)
    targets, head = batch.ids[:, 1:][batch.read], model_head(model)
    if not layout.shared:
        return token_logps(hidden, targets, head)
    distinct, index = unique_read_positions(batch)
    logps, mean_logits = token_logps(hidden[distinct], targets[distinct], head)
    return logps[index], mean_logits[index]


def read_states(model: PreTrainedModel, batch: Batch, layout: Layout, prepare: Prepare | None = None) -> torch.Tensor:
    """Hidden states [n, hidden] of the positions that the batch reads, sequence by sequence. Arguments as ``read_logps``.

    Rows of similar length run together, each group padded to its longest. Padding is at the end, so it does not change a
    sequence's states.
    """
    decoder = getattr(model, decoder_name(model))
    config, dtype = model.config.get_text_config(), next(model.parameters()).dtype
    flops_per_token = 2 * sum(parameter.numel() for parameter in decoder.parameters())
    lengths, device = layout.lengths, batch.ids.device
    device_type = device.type if device.type in CALL_FLOPS else "cuda"
    groups = length_groups(lengths, int(CALL_FLOPS[device_type] / flops_per_token), CALL_TOKENS[device_type])
    states: list[torch.Tensor] = []
    # where each row starts in the flat list of all groups' states
    start, row_starts = 0, torch.empty(len(lengths), dtype=torch.long)
    for rows in groups:
        width = max(lengths[row] for row in rows)
        if prepare is not None:
            prepare(rows, width)
        hidden = decoder(**layout.inputs(rows, width, config, dtype), use_cache=False).last_hidden_state
        states.append(hidden.flatten(0, 1))
        row_starts[rows] = start + width * torch.arange(len(rows))
        start += width * len(rows)
    index = row_starts.to(device)[layout.row] + layout.column
    return torch.cat(states)[index[:, :-1][batch.read]]


def why_not_shared(model: PreTrainedModel) -> str | None:
    """Why the model cannot run pairs with a shared prompt, tried on a small batch; None when it can."""
    config = model.config.get_text_config()
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"attention '{attention}' does not accept an additive mask"
    windows = [name for name in WINDOWS if getattr(config, name, None)]
    if windows and (windows != ["sliding_window"] or not getattr(config, "layer_types", None)):
        return "its config does not say which layers have its sliding window"
    ids, mask = small_batch(config.vocab_size, model.device)
    batch = Batch(ids, mask, mask[:, 1:].bool(), ((0, 2), (1, 3)))
    try:
        with torch.no_grad():
            apart, together = (
                read_states(model, batch, layout).float()
                for layout in (one_row_per_sequence(batch), shared_prefix_rows(batch))
            )
    except Exception as error:  # families raise different types
        return f"it does not accept such a mask ({type(error).__name__}: {str(error)[:100]})"
    change = float((together - apart).norm() / apart.norm())
    return None if change < PROBE_ERROR.get(model.dtype, 1e-4) else f"its states would change by {change:.1g} of their size"


def small_batch(vocabulary: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [4, 12] of two pairs with prompts of five tokens, padded at the end."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (4, 12), generator=generator).to(device)
    ids[2:, :5] = ids[:2, :5]
    mask = torch.ones_like(ids)
    mask[2, 9:] = mask[1, 10:] = 0
    return ids, mask
