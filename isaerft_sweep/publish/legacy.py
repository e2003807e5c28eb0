"""Reads the published project's adapter folders (see ``docs/reference.md``) into this package's format.

Such a folder has ``adapter_config.json`` with ``target_hooks``, ``blocks_manifest.json`` and for each site one
``blocks_N_hook_resid_post.pt``. Those are pickles: only their tensors are read, and one that carries code is refused.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from isaerft_sweep.adapter.config import IsaerftConfig
from isaerft_sweep.errors import ConfigError, FolderError
from isaerft_sweep.journal.atomic_files import write_json, write_text
from isaerft_sweep.naming import ParsedName, parse
from isaerft_sweep.publish.export_folder import new_folder
from isaerft_sweep.results.card.imported_card import PublishedCard, imported_card

BASES = {
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-9b": "google/gemma-2-9b",
    "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped",
}
"""Base models by their short names in the published runs."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
)
SITE = re.compile(r"^blocks_(\d+)_hook_resid_post$")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Imported:
    """An imported adapter. ``name``: the parsed name of the source folder, None when that is not a run's name."""

    folder: Path
    base: str
    kind: str
    layers: list[int]
    name: ParsedName | None
    card: PublishedCard

    @property
    def summary(self) -> str:
        """Learning rate, beta, start and W&B run as far as known; from the card's tags rather than the rounded name."""
        card = self.card
        if card.learning_rate is None or card.beta is None:
            return ""
        exact = any(tag.startswith("lr_") for tag in card.tags)
        rate = repr(card.learning_rate) if exact else f"{card.learning_rate:.1e}"
        started = f", {self.name.started:%Y-%m-%d %H:%M}" if self.name else ""
        return f", {rate}, beta {card.beta!r}{started}{f', {card.wandb}' if card.wandb else ''}"


def import_folder(source: Path, out: Path | None, base: str | None) -> Imported:
    """Write the adapter in ``source`` as ``out`` (None: ``imported/<its name>`` in the current folder).

    ``base``: the base model; None: the one that the folder names. Raises FolderError when the published project did not
    write the folder, or a block in it contradicts its config; nothing is executed or written then.
    """
    config = _json(source, "adapter_config.json")
    hooks, names = config.get("target_hooks"), _json(source, "blocks_manifest.json").get("block_names")
    if not isinstance(hooks, list) or not isinstance(names, list) or len(hooks) != len(names) or not names:
        raise FolderError(
            f"{source}: adapter_config.json must have target_hooks and blocks_manifest.json as many block_names, but "
            f"they have {hooks!r} and {names!r}. An adapter of this package needs no import."
        )
    layers = [_layer(source, name) for name in names]
    sites = [_site(source, layer, hook) for layer, hook in zip(layers, hooks, strict=True)]
    blocks = [_block(source, name, config) for name in names]
    forms = {(kind, settings["rank"], settings["hidden_size"], settings["hidden_layers"]) for kind, settings, _ in blocks}
    if len(forms) != 1:
        raise FolderError(f"{source}: all blocks must have one form but have {sorted(map(str, forms))}.")
    kind, settings, _ = blocks[0]
    named = _name(source)
    card = read_published_card(source, named)
    base = (
        base or str(config.get("base_model_name_or_path") or "") or card.base or (BASES.get(named.model) if named else None)
    )
    if not base:
        raise FolderError(f"{source} does not name its base model. Give it: --base ORG/NAME, for example google/gemma-2-2b.")
    adapter = IsaerftConfig(sites=sites, kind=kind, base_model_name_or_path=base, inference_mode=True, **settings)
    target = (out or Path("imported") / source.resolve().name).expanduser().absolute()
    tensors = {
        f"base_model.model.{_layers_name(base)}.{layer}.isaerft_block.{key}": tensor
        for layer, (_, _, block) in zip(layers, blocks, strict=True)
        for key, tensor in block.items()
    }
    _write(source, target, adapter, tensors, card)
    return Imported(target, base, kind, layers, named, card)


def _json(source: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((source / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(
            f"'{source}' must be a folder of the published project, with adapter_config.json, blocks_manifest.json and "
            f"blocks_*.pt, but {name} cannot be read: {error}."
        ) from error
    if not isinstance(content, dict):
        raise FolderError(f"{source / name} must hold a JSON object but holds {str(content)[:80]!r}.")
    return content


def _layer(source: Path, name: Any) -> int:
    match = SITE.match(str(name))
    if match is None:
        raise FolderError(
            f"{source}: a block must be named blocks_N_hook_resid_post (the output of decoder layer N) but got {name!r}."
        )
    return int(match[1])


def _site(source: Path, layer: int, hook: Any) -> dict[str, Any]:
    """The site of one hook. Patterns are refused: the published project resolved them to SAEs that the folder omits."""
    if not isinstance(hook, list) or len(hook) != 2 or not all(isinstance(part, str) and part for part in hook):
        raise FolderError(f"{source}: each of target_hooks must be [release, sae_id] but one is {hook!r}.")
    if set("".join(hook)) & set("*|()[]?+^$\\"):
        raise FolderError(f"{source}: target_hooks must name one SAE but hold the pattern {hook!r}. Put its name there.")
    layer_match = re.search(r"(?:layer_|blocks\.)(\d+)(?!\d)", hook[1])
    if layer_match and int(layer_match[1]) != layer:
        raise FolderError(
            f"{source}: the block of layer {layer} must have an SAE of that layer but target_hooks, in the order of "
            f"block_names, give it {hook[1]!r}. Fix the order in adapter_config.json."
        )
    return {"layer": layer, "sae_release": hook[0], "sae_id": hook[1]}


def _block(source: Path, name: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any], Tensors]:
    """Kind, settings and tensors of one block in this package's format."""
    state = _state(source / f"{name}.pt")
    depth = config.get("depth")
    if config.get("ia3"):
        return "scale", _settings(), _renamed(source, name, state, {"scaling_factors": "scale"})
    if depth == -1:
        return "bias", _settings(), _renamed(source, name, state, {"sequential.0.bias": "bias"})
    if not isinstance(depth, int) or depth < 0:
        raise FolderError(f"{source}: depth must be -1 or more, or ia3 true, but got depth={depth!r}.")
    return _feed_forward(source, name, state, depth)


def _state(path: Path) -> Tensors:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # such a file is refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message recommends weights_only=False, so this one leaves it out
        forbidden_global = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise FolderError(
            f"{path} must hold only tensors but holds something else, perhaps code; it was not loaded. "
            + (f"It imports {forbidden_global[1]}." if forbidden_global else "It is not a file of torch.save.")
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        reason = (str(error) or "the file is cut short").splitlines()[0]
        raise FolderError(f"{path} cannot be read as a state dict ({type(error).__name__}: {reason}).") from error
    tensors = isinstance(state, dict) and all(isinstance(t, torch.Tensor) for t in state.values())
    if not tensors or not state:
        raise FolderError(f"{path} must be a state dict (names to tensors) but is {type(state).__name__}.")
    non_finite = [key for key, value in state.items() if not torch.isfinite(value.float()).all()]
    if non_finite:
        raise FolderError(f"{path} must hold finite numbers but {non_finite[0]} has NaN or infinity.")
    return {str(key): value.float() for key, value in state.items()}


def _renamed(source: Path, name: str, state: Tensors, names: Mapping[str, str]) -> Tensors:
    expected = dict.fromkeys(names, 1)
    if {key: tensor.dim() for key, tensor in state.items()} != expected:
        shapes = {key: list(tensor.shape) for key, tensor in state.items()}
        raise FolderError(
            f"{source / name}.pt must hold one vector named {', '.join(names)}, as its config says, but holds {shapes}."
        )
    return {names[key]: tensor for key, tensor in state.items()}


def _feed_forward(source: Path, name: str, state: Tensors, depth: int) -> tuple[str, dict[str, Any], Tensors]:
    """The block from linear maps with ReLU between all but the last two, which form one map of rank hidden size.

    W₂(W₁x + c₁) + c₂ = W₂W₁x + (W₂c₁ + c₂).
    """
    indices = [2 * i if i < depth else max(0, 2 * depth - 1) for i in range(depth + 1)]
    try:
        maps = [(state.pop(f"sequential.{i}.weight"), state.pop(f"sequential.{i}.bias")) for i in indices]
    except KeyError as error:
        raise FolderError(f"{source / name}.pt lacks {error}, which depth={depth} needs.") from error
    if state:
        raise FolderError(f"{source / name}.pt has tensors that depth={depth} does not explain: {', '.join(state)}.")
    _check_shapes(source, name, maps)
    if depth == 0:
        (weight, bias), *_ = maps
        return "linear", _settings(), {"weight_0": weight, "bias_0": bias}
    (inner, inner_bias), (outer, outer_bias) = maps[-2:]
    bias = outer @ inner_bias + outer_bias
    if depth == 1:
        joined = {"down_0": inner, "weight_0": outer, "bias_0": bias}
        return "linear", _settings(rank=inner.shape[0]), joined
    tensors: Tensors = {}
    for i, (weight, own_bias) in enumerate(maps[:-2]):
        tensors |= {f"weight_{i}": weight, f"bias_{i}": own_bias}
    tensors |= {f"weight_{depth - 1}": outer @ inner, f"bias_{depth - 1}": bias}
    return "mlp", _settings(hidden_size=inner.shape[1], hidden_layers=depth - 1), tensors


def _check_shapes(source: Path, name: str, maps: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Raise FolderError unless the widths of consecutive maps agree and the last output is as wide as the first input."""
    shapes = [(list(weight.shape), list(bias.shape)) for weight, bias in maps]
    fits = all(len(weight) == 2 and bias == weight[:1] for weight, bias in shapes)
    if fits:
        widths = [shapes[0][0][1], *(weight[0] for weight, _ in shapes)]
        fits = widths[0] == widths[-1] and all(shape[0][1] == width for shape, width in zip(shapes, widths, strict=False))
    if not fits:
        raise FolderError(
            f"{source / name}.pt must hold maps that follow each other, from d_sae to d_sae, but has the shapes {shapes}."
        )


def _settings(rank: int | None = None, hidden_size: int | None = None, hidden_layers: int = 1) -> dict[str, Any]:
    return {"rank": rank, "hidden_size": hidden_size, "hidden_layers": hidden_layers}


def _name(source: Path) -> ParsedName | None:
    try:
        return parse(source.resolve().name)
    except ConfigError:
        return None


def _layers_name(base: str) -> str:
    """Module path of the decoder layers, guessed from the name ``base``: an import does not need the weights."""
    return "gpt_neox.layers" if re.search("pythia|neox", base.lower()) else "model.layers"


def read_published_card(source: Path, named: ParsedName | None) -> PublishedCard:
    """The run's settings from the card in ``source``. Raises FolderError when card and name describe different runs."""
    fields: Any = {}
    text = ""
    with suppress(OSError, UnicodeDecodeError):
        text = (source / "README.md").read_text(encoding="utf-8")
    front_matter = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    if front_matter:
        with suppress(yaml.YAMLError):
            fields = yaml.safe_load(front_matter[1]) or {}
    fields = fields if isinstance(fields, dict) else {}
    tags = tuple(str(tag) for tag in fields.get("tags") or () if isinstance(tag, (str, int, float)))
    run_url = re.search(r"https?://[^\s()\"']+/runs/[\w-]+", text)
    card = PublishedCard(
        named=named,
        learning_rate=_number(tags, "lr_") or (named.learning_rate if named else None),
        beta=_number(tags, "beta_") if _number(tags, "beta_") is not None else (named.beta if named else None),
        tags=tags,
        base=str(fields.get("base_model") or "") or None,
        wandb=run_url[0] if run_url else None,
    )
    if named and card.learning_rate is not None and f"{card.learning_rate:.1e}" != f"{named.learning_rate:.1e}":
        raise FolderError(
            f"{source / 'README.md'} must be the card of this run but its tag says learning rate {card.learning_rate!r}, "
            f"and the folder's name {named.learning_rate:.1e}. Remove that card."
        )
    return card


def _number(tags: Sequence[str], prefix: str) -> float | None:
    for tag in tags:
        with suppress(ValueError):
            if tag.startswith(prefix):
                return float(tag[len(prefix) :])
    return None


def _write(source: Path, target: Path, adapter: IsaerftConfig, tensors: Tensors, card: PublishedCard) -> None:
    with new_folder(target) as staging:
        adapter.save_pretrained(str(staging))
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, staging / "adapter_model.safetensors")
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
        name = source.resolve().name
        if card.metadata:
            write_json(staging / "imported.json", {"from": name, **card.metadata})
        write_text(
            staging / "README.md", imported_card(staging, name, str(adapter.base_model_name_or_path), adapter.kind, card)
        )
