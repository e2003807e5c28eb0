"""Checks, from an SAE's own config, that it was trained at the hook point where an adapter uses it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from isaerft_sweep.adapter.sae import FrozenSae, describe
from isaerft_sweep.errors import ModelError
from isaerft_sweep.preferences import expanded

OUTPUTS = (
    r"blocks\.(\d+)\.hook_(?:resid_post|out)",  # TransformerLens and its bridge
    r"(?:[a-z_]+\.)*(?:layers|h|blocks)\.(\d+)(?:\.output)?",  # transformers' module names
    r"resid_post_layer_(\d+)",  # dictionary_learning
)
"""Names of the residual stream after decoder layer N."""
INPUTS = (
    r"blocks\.(\d+)\.hook_(?:resid_pre|in)",
    r"(?:[a-z_]+\.)*(?:layers|h|blocks)\.(\d+)\.input",
    r"resid_pre_layer_(\d+)",
)
"""Names of the residual stream before decoder layer N, which is the one after layer N − 1."""


def check_hook(frozen: FrozenSae, hook_point: Mapping[str, Any], model: str, index: int = 0) -> None:
    """Raise ModelError if the SAE's config names another model or another place than the output of the hook point's layer.

    Args:
        frozen: the SAE.
        hook_point: its entry in ``adapter.sites``.
        model: name of the model.
        index: of the entry, for the message.
    """
    metadata = _metadata(frozen, hook_point)
    hook, trained_on = metadata.get("hook_name"), metadata.get("model_name")
    if hook:
        layer = residual_layer(str(hook), metadata.get("hook_layer"))
    else:
        layer = metadata.get("hook_layer", hook_point["layer"])
    of_model = trained_on is None or same_model(trained_on, model)
    of_stream = metadata.get("hook_head_index") is None and metadata.get("hook_name_out") in (None, hook)
    if layer == hook_point["layer"] and of_model and of_stream:
        return
    nearest, unnamed = "", f"a hook of layer {layer} without a name" if "hook_layer" in metadata else "a hook without a name"
    if isinstance(layer, int) and layer >= 0 and layer != hook_point["layer"] and of_model and of_stream:
        nearest = f" Set the layer: adapter.sites.{index}.layer={layer}."
    if not of_stream:
        hook = f"{hook}, head {metadata.get('hook_head_index')}, written to {metadata.get('hook_name_out') or hook}"
    raise ModelError(
        f"the SAE must have been trained on the output of decoder layer {hook_point['layer']} (blocks.{hook_point['layer']}."
        f"hook_resid_post) of '{model}', but {describe(hook_point)} says it was trained on "
        f"{hook or unnamed} of '{trained_on or 'a model without a name'}'.{nearest} "
        "Choose the SAE of this hook point, or skip this check: adapter.force_hook=true."
    )


def residual_layer(hook: str, layer: Any = None) -> int | None:
    """The decoder layer whose output ``hook`` names (−1: the embeddings); None when it is not a residual stream.

    ``layer``: from older configs, which have it separately, for names such as ``blocks.{layer}.hook_resid_post``.
    """
    name = hook.replace("{layer}", str(layer))
    for patterns, offset in ((OUTPUTS, 0), (INPUTS, 1)):
        for pattern in patterns:
            match = re.fullmatch(pattern, name)
            if match:
                return int(match[1]) - offset
    return None


def _metadata(frozen: FrozenSae, hook_point: Mapping[str, Any]) -> dict[str, Any]:
    """Names of hook and model, if the SAE's config or sae_lens's directory have them."""
    sources = [frozen.sae.cfg.metadata.to_dict(), *_raw_configs(hook_point), *_directory_entry(hook_point)]
    metadata: dict[str, Any] = {}
    for source in sources:
        values = {
            "hook_name": source.get("hook_name") or source.get("hook_point") or source.get("hf_hook_name"),
            "hook_layer": source.get("hook_layer", source.get("hook_point_layer")),
            "model_name": source.get("model_name"),
            "hook_name_out": source.get("hook_name_out"),
            "hook_head_index": source.get("hook_head_index"),
        }
        metadata |= {name: value for name, value in values.items() if value is not None and name not in metadata}
    return metadata


def _raw_configs(hook_point: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The config file of a local folder: sae_lens drops keys that another version named differently."""
    if not hook_point.get("sae_path"):
        return
    with suppress(OSError, ValueError):
        raw = json.loads((expanded(str(hook_point["sae_path"])) / "cfg.json").read_text(encoding="utf-8"))
        yield from (part for part in (raw.get("metadata"), raw) if isinstance(part, dict))


def _directory_entry(hook_point: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The SAE's entry in sae_lens's list of releases."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    entry = get_pretrained_saes_directory().get(str(hook_point.get("sae_release")))
    if entry is not None:
        hook = str(hook_point["sae_id"]) if re.fullmatch(r"blocks\.\d+\.hook_\w+", str(hook_point["sae_id"])) else None
        yield {"hook_name": hook, "model_name": entry.model}


def same_model(one: str, other: str) -> bool:
    """Whether two names mean one model: with or without owner, TransformerLens's short names, local folders."""
    return not _names(one).isdisjoint(_names(other))


def _names(model: str) -> set[str]:
    """All names of ``model``, in lower case and without owner."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    names = {model}
    folder = expanded(model)
    if folder.is_dir():
        # a folder of the Hub's cache is models--OWNER--NAME/snapshots/COMMIT
        names |= {part.rpartition("--")[2] for part in folder.absolute().parts if part.startswith("models--")}
        names.add(folder.resolve().name)
        with suppress(OSError, ValueError, AttributeError):
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            names.add(str(config.get("_name_or_path") or model))
    short = {name.rstrip("/").rpartition("/")[2].lower() for name in names}
    for name in [*names, *short]:
        with suppress(ValueError):
            short.add(get_official_model_name(name).rpartition("/")[2].lower())
    return short
