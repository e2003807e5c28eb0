"""DiffMean: a steering vector without training, the mean activation of chosen answers minus that of rejected ones.

(Marks and Tegmark 2023, arXiv 2310.06824, section 5; a baseline of AxBench, arXiv 2501.17148.)
"""

from __future__ import annotations

import peft
import torch
from datasets import Dataset

from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.adapter.layer import IsaerftLayer
from isaerft_sweep.trial.forward.frozen_prefix import stream_of
from isaerft_sweep.trial.forward.upper_layers import UpperLayers
from isaerft_sweep.trial.pair_batch import pair_batch
from isaerft_sweep.trial.reference import without_adapter


@torch.no_grad()
def set_difference_of_means(
    model: peft.PeftModel, rows: Dataset, strength: float, above: UpperLayers | None, pad: int, batch_size: int
) -> None:
    """Set the adapter's vector at each hook point to ``strength`` times the difference at that layer's output.

    Every answer counts the same: its mean is over its own tokens.

    Args:
        model: with a ``diffmean`` adapter.
        rows: tokenised pairs.
        strength: the multiple.
        above: the stored output of the frozen layers, which serves the lowest hook point; None: it is computed.
        pad: id of the padding token.
        batch_size: pairs per batch.
    """
    with without_adapter(model) as base:
        layers = decoder_layers(base)
        wrapped = {index: layer for index, layer in enumerate(layers) if isinstance(layer, IsaerftLayer)}
        sums = {index: torch.zeros(base.config.get_text_config().hidden_size) for index in wrapped}
        for start in range(0, len(rows), batch_size):
            batch = pair_batch(rows[start : start + batch_size], pad, base.device, read_prompt=False)
            ids, mask = batch.batch.ids, batch.batch.mask
            answer = torch.nn.functional.pad(batch.answer, (1, 0)).unsqueeze(-1)  # true at the answer's own tokens
            for index, layer in wrapped.items():
                stream = above.hidden(ids, mask) if above and index == min(wrapped) else stream_of(base, layer, ids, mask)
                means = (stream.float() * answer).sum(1) / answer.sum(1)
                sums[index] += (means[: batch.pairs] - means[batch.pairs :]).sum(0).cpu()
        for index, layer in wrapped.items():
            bias = next(iter(layer.isaerft_block[layer.active_adapters[0]].parameters()))
            bias.copy_(strength * sums[index] / len(rows))
