"""Exports a trained adapter as a model folder that plain transformers loads, and checks its logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from isaerft_sweep.adapter.load import load_model
from isaerft_sweep.adapter.merge import LORA, check_mergeable
from isaerft_sweep.adapter.strength import set_strength
from isaerft_sweep.adapter.system_prompt import check_changes_model
from isaerft_sweep.errors import ModelError
from isaerft_sweep.journal.atomic_files import write_text
from isaerft_sweep.models.loading import device
from isaerft_sweep.publish.export_folder import new_folder
from isaerft_sweep.publish.standalone import write_standalone
from isaerft_sweep.results.card.model_card import exported_card

MERGED, STANDALONE = "merged", "standalone"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest allowed difference between the logits of adapter and export, relative to the largest logit: rounding."""
MAX_LOST = 0.5
"""Largest allowed share of the adapter's effect that the export lacks (RMS over all logits); 1 is a model without it."""
TEXTS = ("The quick brown fox jumps over the lazy dog.", "My parcel has not arrived yet. What can I do?", "1 2 3")


@dataclass(frozen=True)
class Exported:
    """A written export.

    ``difference``: largest difference between the logits of adapter and export, relative to the largest logit.
    ``lost``: the share of the adapter's effect on the logits that the export lacks (root mean square).
    """

    folder: Path
    form: str
    difference: float
    lost: float


def export(
    adapter: Path,
    out: Path | None,
    form: str | None,
    cache: str | None,
    dtype: str | None = None,
    strength: float = 1.0,
) -> Exported:
    """Write the model with the adapter in it, load it again, and compare its logits with the adapter's.

    Args:
        adapter: a folder with an adapter.
        out: the folder to create; None: ``export-FORM`` beside the adapter, or ``ADAPTER-export-FORM`` for an adapter
            outside a trial, since one folder may hold several.
        form: ``merged`` (plain weights, where that is exact), ``standalone`` (with custom model code), or None: merged
            where it is exact, else standalone.
        cache: the folder of converted models.
        dtype: of the weights; None: as the trial loads them on this machine.
        strength: multiple of the adapter's change that is exported.

    Raises ModelError when the form is not possible or the logits differ, FolderError when ``out`` cannot be written.
    It leaves no files behind then.
    """
    model, tokenizer = load_model(str(adapter), cache=cache, dtype=dtype)
    check_changes_model(model)
    if strength != 1:
        set_strength(model, strength)
    kinds = {getattr(config, "kind", LORA) for config in model.peft_config.values()}
    form = form or _best_form(model, kinds)
    if form == MERGED:
        check_mergeable(model.get_base_model(), kinds)
    adapter_name = adapter.resolve().name
    part = form if strength == 1 else f"{form}-strength-{strength:g}"
    name = f"export-{part}" if adapter_name == "adapter" else f"{adapter_name}-export-{part}"
    target = (out or adapter.absolute().parent / name).expanduser().absolute()
    expected = _logits(model, tokenizer)
    with model.disable_adapter():
        without = _logits(model, tokenizer)
    base_dtype = next(model.get_base_model().parameters()).dtype
    with new_folder(target) as staging:
        if form == MERGED:
            model.merge_and_unload().save_pretrained(staging)
        else:
            write_standalone(model, staging)
        tokenizer.save_pretrained(staging)
        card = adapter / "README.md"
        if card.is_file():
            write_text(staging / card.name, exported_card(card.read_text(encoding="utf-8"), form == STANDALONE))
        del model  # memory holds one model at a time
        difference, lost = _compare(staging, form, tokenizer, expected, without, base_dtype)
    return Exported(target, form, difference, lost)


def _best_form(model: peft.PeftModel, kinds: set[str]) -> str:
    try:
        check_mergeable(model.get_base_model(), kinds)
    except ModelError:
        return STANDALONE
    return MERGED


@torch.no_grad()
def _logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """Logits of all positions of ``TEXTS`` [positions, vocabulary], float32."""
    inputs = [tokenizer(text, return_tensors="pt").to(model.device) for text in TEXTS]
    rows = [model.eval()(input_ids=i["input_ids"], attention_mask=i["attention_mask"]).logits[0] for i in inputs]
    return torch.cat(rows).float().cpu()


def _compare(
    folder: Path, form: str, tokenizer: Any, expected: torch.Tensor, without: torch.Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    """``difference`` and ``lost`` of ``Exported``; raises ModelError when either is too large.

    ``lost`` catches an adapter whose whole effect is as small as the rounding that ``difference`` allows.
    ``expected``, ``without``: logits [positions, vocabulary] with and without the adapter.
    """
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=form == STANDALONE)
    actual = _logits(exported.to(device()), tokenizer)
    difference = ((actual - expected).abs().max() / expected.abs().max()).item()
    effect = (expected - without).norm().item()
    lost = (actual - expected).norm().item() / effect if effect else 0.0
    if not (difference <= TOLERANCE[dtype] and lost <= MAX_LOST):
        raise ModelError(
            f"the export must give the adapter's logits but they differ by {difference:.2g} of the largest one (at most "
            f"{TOLERANCE[dtype]:g} is rounding), and {lost:.0%} of what the adapter changes is lost. Nothing was kept. Try "
            "--dtype float32 or --standalone, or keep the adapter separate: isaerft-sweep push."
        )
    return difference, lost
