"""Whether an SAE was trained on the very place that an adapter puts it to, by what the SAE's own config says."""

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


def check_hook(frozen: FrozenSae, site: Mapping[str, Any], model: str, index: int = 0) -> None:
    """Raise ModelError unless the SAE was trained on the output of the site's layer of ``model``, or does not say.

    ``index``: the site's number, for the error.
    """
    said = _said(frozen, site)
    hook, trained_on = said.get("hook_name"), said.get("model_name")
    layer = residual_layer(hook, said.get("hook_layer")) if hook else site["layer"]
    of_model = trained_on is None or same_model(trained_on, model)
    if layer == site["layer"] and of_model:
        return
    nearest = ""
    if layer is not None and layer >= 0 and layer != site["layer"] and of_model:
        nearest = f" Set the layer: adapter.sites.{index}.layer={layer}."
    raise ModelError(
        f"the SAE must have been trained on the output of decoder layer {site['layer']} (blocks.{site['layer']}."
        f"hook_resid_post) of '{model}', but {describe(site)} says it was trained on {hook or 'a hook without a name'} "
        f"of '{trained_on or 'a model without a name'}'.{nearest} Choose the SAE of this place, or insist that it is "
        "the right one: adapter.force_hook=true."
    )


def residual_layer(hook: str, layer: Any = None) -> int | None:
    """The decoder layer whose output ``hook`` names (−1: the embeddings); None when it is no residual stream.

    ``layer``: what older configs have besides, for names such as ``blocks.{layer}.hook_resid_post``.
    """
    name = hook.replace("{layer}", str(layer))
    for patterns, before in ((OUTPUTS, 0), (INPUTS, 1)):
        for pattern in patterns:
            found = re.fullmatch(pattern, name)
            if found:
                return int(found[1]) - before
    return None


def _said(frozen: FrozenSae, site: Mapping[str, Any]) -> dict[str, Any]:
    """``hook_name``, ``hook_layer`` and ``model_name``, as far as the SAE's config or sae_lens's directory have them."""
    sources = [frozen.sae.cfg.metadata.to_dict(), *_written(site), *_in_directory(site)]
    said: dict[str, Any] = {}
    for source in sources:
        found = {
            "hook_name": source.get("hook_name") or source.get("hook_point") or source.get("hf_hook_name"),
            "hook_layer": source.get("hook_layer", source.get("hook_point_layer")),
            "model_name": source.get("model_name"),
        }
        said |= {name: value for name, value in found.items() if value is not None and name not in said}
    return said


def _written(site: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The config of a local folder as it was written: sae_lens drops what it holds by another version's names."""
    if not site.get("sae_path"):
        return
    with suppress(OSError, ValueError):
        raw = json.loads((expanded(str(site["sae_path"])) / "cfg.json").read_text(encoding="utf-8"))
        yield from (part for part in (raw.get("metadata"), raw) if isinstance(part, dict))


def _in_directory(site: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What sae_lens's list of releases says of the SAE."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    entry = get_pretrained_saes_directory().get(str(site.get("sae_release")))
    if entry is not None:
        hook = str(site["sae_id"]) if re.fullmatch(r"blocks\.\d+\.hook_\w+", str(site["sae_id"])) else None
        yield {"hook_name": hook, "model_name": entry.model}


def same_model(one: str, other: str) -> bool:
    """Whether two names are of the same model: with and without owner, TransformerLens's short names, local folders."""
    return not _names(one).isdisjoint(_names(other))


def _names(model: str) -> set[str]:
    """All that ``model`` may be called, in small letters and without owner."""
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
