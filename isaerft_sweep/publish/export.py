"""A trained adapter as a model folder that plain transformers loads, checked before it is handed over."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from isaerft_sweep.adapter.load import load_model
from isaerft_sweep.adapter.merge import check_mergeable
from isaerft_sweep.errors import ModelError
from isaerft_sweep.journal.atomic_files import write_text
from isaerft_sweep.models.loading import device
from isaerft_sweep.publish.export_folder import new_folder
from isaerft_sweep.publish.standalone import write_standalone
from isaerft_sweep.results.card import exported_card

MERGED, STANDALONE = "merged", "standalone"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest difference between logits of adapter and export, over the largest logit: roundings, some layers apart."""
LOST = 0.5
"""How much of what the adapter changes may be lost, over all logits in the root mean square. Without the adapter it is 1."""
TEXTS = ("The quick brown fox jumps over the lazy dog.", "My parcel has not arrived yet. What can I do?", "1 2 3")


@dataclass(frozen=True)
class Exported:
    """``difference``: the largest between the logits of the adapter and of the export, over the largest logit.

    ``lost``: the share of the adapter's own change of the logits that the export lacks (root mean square).
    """

    folder: Path
    form: str
    difference: float
    lost: float


def export(adapter: Path, out: Path | None, form: str | None, cache: str | None, dtype: str | None = None) -> Exported:
    """Write the model with the adapter in it, load it again, and compare its logits with the adapter's.

    Args:
        adapter: a folder with an adapter.
        out: the folder to make; None: beside the adapter, ``export-FORM``, with the adapter's name before it where that is
            not a trial's: many may lie in one folder.
        form: ``merged`` (plain weights, where that is exact), ``standalone`` (with code of its own), or None: merged
            where it is exact, else standalone.
        cache: where converted models are kept.
        dtype: of the weights; None: as the trial loads them on this machine.

    Raises ModelError when the form is not possible or the logits differ, FolderError when ``out`` cannot be written;
    nothing is left behind then.
    """
    model, tokenizer = load_model(str(adapter), cache=cache, dtype=dtype)
    kinds = {config.kind for config in model.peft_config.values()}
    form = form or _fitting(model, kinds)
    if form == MERGED:
        check_mergeable(model.get_base_model(), kinds)
    own = adapter.resolve().name
    name = f"export-{form}" if own == "adapter" else f"{own}-export-{form}"
    target = (out or adapter.absolute().parent / name).expanduser().absolute()
    expected = _logits(model, tokenizer)
    with model.disable_adapter():
        without = _logits(model, tokenizer)
    of_dtype = next(model.get_base_model().parameters()).dtype
    with new_folder(target) as aside:
        if form == MERGED:
            model.merge_and_unload().save_pretrained(aside)
        else:
            write_standalone(model, aside)
        tokenizer.save_pretrained(aside)
        card = adapter / "README.md"
        if card.is_file():
            write_text(aside / card.name, exported_card(card.read_text(encoding="utf-8"), form == STANDALONE))
        del model  # one at a time is in memory
        difference, lost = _compare(aside, form, tokenizer, expected, without, of_dtype)
    return Exported(target, form, difference, lost)


def _fitting(model: peft.PeftModel, kinds: set[str]) -> str:
    try:
        check_mergeable(model.get_base_model(), kinds)
    except ModelError:
        return STANDALONE
    return MERGED


@torch.no_grad()
def _logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """Logits of all positions of ``TEXTS`` [positions, vocabulary], float32."""
    inputs = [tokenizer(text, return_tensors="pt").to(model.device) for text in TEXTS]
    found = [model.eval()(input_ids=i["input_ids"], attention_mask=i["attention_mask"]).logits[0] for i in inputs]
    return torch.cat(found).float().cpu()


def _compare(
    folder: Path, form: str, tokenizer: Any, expected: torch.Tensor, without: torch.Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    """The export's difference and what it has lost; raises ModelError when either is too much.

    The second catches an adapter whose whole effect is as small as the roundings that the first allows.
    """
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=form == STANDALONE)
    found = _logits(again.to(device()), tokenizer)
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    effect = (expected - without).norm().item()
    lost = (found - expected).norm().item() / effect if effect else 0.0
    if not (difference <= TOLERANCE[dtype] and lost <= LOST):
        raise ModelError(
            f"the export must give the adapter's logits but they differ by {difference:.2g} of the largest one (at most "
            f"{TOLERANCE[dtype]:g} is rounding), and {lost:.0%} of what the adapter changes is lost. Nothing was kept. Try "
            "--dtype float32 or --standalone, or keep the adapter separate: isaerft-sweep push."
        )
    return difference, lost
