"""A trial's way through the model: log-probabilities of the tokens that its loss reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from isaerft_sweep.adapter.architecture import decoder_name
from isaerft_sweep.trial.batch_layout import (
    Batch,
    Layout,
    TokenLogps,
    one_row_per_sequence,
    shared_prefix_rows,
    unique_read_positions,
)
from isaerft_sweep.trial.frozen_prefix import CALL_TOKENS
from isaerft_sweep.trial.head import model_head, token_logps
from isaerft_sweep.trial.length_groups import length_groups
from isaerft_sweep.trial.upper_layers import UpperLayers

CALL_FLOPS = {"cpu": 2e9, "cuda": 2e12}
"""What a device computes in the time that one more forward pass costs whatever its size: some milliseconds."""

PROBE_ERROR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far states with and without shared prompts may be apart, relative to their size."""

WINDOWS = (
    "sliding_window",
    "window_size",
    "attention_window_size",
    "attention_window",
    "local_attention",
    "attention_chunk_size",
)
"""What configs call the span of tokens that a layer looks back: in a row with two answers it would be another one."""

Prepare = Callable[[list[int], int], None]


@dataclass(frozen=True)
class ForwardStrategy:
    """How a batch goes through a trial's model.

    ``above`` stands in for the frozen layers up to the hook point, where their output is stored. ``share_prompts``: a pair's
    two answers go behind one prompt. ``lean``: logits are computed only where the loss reads them; else the model's own
    forward pass runs. ``base``: the model without any adapter, where other trials may share the pass.
    """

    above: UpperLayers | None = None
    share_prompts: bool = False
    lean: bool = True
    base: PreTrainedModel | None = None

    def forward(self, model: PreTrainedModel, batch: Batch) -> TokenLogps:
        """The numbers of each token that is read, row by row; ``model``: the trial's own."""
        if not self.lean:
            return plain_logps(model, batch)
        layout = make_layout(batch, self.share_prompts)
        if self.above is None:
            return TokenLogps(*token_numbers(model, batch, layout))
        above, hidden = self.above, layout.arranged(self.above.hidden(batch.ids, batch.mask), batch.mask)

        def prepare(rows: list[int], width: int) -> None:
            above.give(hidden[rows, :width])

        return TokenLogps(*token_numbers(model, batch, layout, prepare))


def plain_logps(model: PreTrainedModel, batch: Batch) -> TokenLogps:
    """By the model's own forward pass, with all logits; of a model with ``output_router_logits`` its router's loss too."""
    outputs = model(batch.ids, attention_mask=batch.mask, use_cache=False)
    logits = outputs.logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    router = outputs.aux_loss if getattr(model.config, "output_router_logits", False) else None
    return TokenLogps(logps[batch.read], logits.mean(-1)[batch.read], router)


def make_layout(batch: Batch, share_prompts: bool) -> Layout:
    """How the batch's sequences go through the decoder."""
    return shared_prefix_rows(batch) if share_prompts else one_row_per_sequence(batch)


def token_numbers(
    model: PreTrainedModel, batch: Batch, layout: Layout, prepare: Prepare | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ForwardStrategy.forward``. ``prepare`` is told the rows and the width of every call of the decoder before it."""
    hidden = read_states(model, batch, layout, prepare)
    targets, head = batch.ids[:, 1:][batch.read], model_head(model)
    if not layout.shared:
        return token_logps(hidden, targets, head)
    wanted, places = unique_read_positions(batch)
    logps, means = token_logps(hidden[wanted], targets[wanted], head)
    return logps[places], means[places]


def read_states(model: PreTrainedModel, batch: Batch, layout: Layout, prepare: Prepare | None = None) -> torch.Tensor:
    """Hidden states [n, hidden] of the positions that are read, sequence by sequence.

    Rows of near length run together, each group padded to its own longest. Padding is at the end, and what a
    sequence computes does not depend on it.
    """
    decoder = getattr(model, decoder_name(model))
    config, dtype = model.config.get_text_config(), next(model.parameters()).dtype
    per_token = 2 * sum(parameter.numel() for parameter in decoder.parameters())
    lengths, device = layout.lengths, batch.ids.device
    kind = device.type if device.type in CALL_FLOPS else "cuda"
    groups = length_groups(lengths, int(CALL_FLOPS[kind] / per_token), CALL_TOKENS[kind])
    states: list[torch.Tensor] = []
    # where each row begins in the flat list of all groups' states
    start, begins = 0, torch.empty(len(lengths), dtype=torch.long)
    for rows in groups:
        width = max(lengths[row] for row in rows)
        if prepare is not None:
            prepare(rows, width)
        hidden = decoder(**layout.inputs(rows, width, config, dtype), use_cache=False).last_hidden_state
        states.append(hidden.flatten(0, 1))
        begins[rows] = start + width * torch.arange(len(rows))
        start += width * len(rows)
    wanted = begins.to(device)[layout.row] + layout.column
    return torch.cat(states)[wanted[:, :-1][batch.read]]


def why_not_shared(model: PreTrainedModel) -> str | None:
    """Why the model cannot take pairs behind a shared prompt; None when it can. Tries it on a small batch."""
    config = model.config.get_text_config()
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"attention '{attention}' takes no mask of that kind"
    windows = [name for name in WINDOWS if getattr(config, name, None)]
    if windows and (windows != ["sliding_window"] or not getattr(config, "layer_types", None)):
        return "its sliding window cannot be told per layer"
    ids, mask = small_batch(config.vocab_size, model.device)
    batch = Batch(ids, mask, mask[:, 1:].bool(), ((0, 2), (1, 3)))
    try:
        with torch.no_grad():
            both = [
                read_states(model, batch, layout).float()
                for layout in (one_row_per_sequence(batch), shared_prefix_rows(batch))
            ]
    except Exception as error:  # every family may object in its own way
        return f"it does not take such a mask ({type(error).__name__}: {str(error)[:100]})"
    apart = float((both[1] - both[0]).norm() / both[0].norm())
    return None if apart < PROBE_ERROR.get(model.dtype, 1e-4) else f"its states would change by {apart:.1g} of their size"


def small_batch(vocabulary: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [4, 12] of two pairs with prompts of five tokens, padded at the end."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (4, 12), generator=generator).to(device)
    ids[2:, :5] = ids[:2, :5]
    mask = torch.ones_like(ids)
    mask[2, 9:] = mask[1, 10:] = 0
    return ids, mask
