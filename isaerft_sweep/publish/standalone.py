"""Writes a model folder with custom code for its ISAERFT blocks: transformers loads it without this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import peft
import torch
from torch import nn

from isaerft_sweep.adapter.architecture import decoder_layers, decoder_layers_name
from isaerft_sweep.adapter.blocks import BiasBlock, FeedForwardBlock, LoreftBlock, ScaleBlock
from isaerft_sweep.adapter.layer import IsaerftLayer
from isaerft_sweep.errors import ModelError
from isaerft_sweep.journal.atomic_files import write_json, write_text
from isaerft_sweep.paths import asset

MODULE = "modeling_isaerft"
TEMPLATE = f"{MODULE}.py.jinja"
ENCODERS = ("standard", "topk", "jumprelu")
"""SAE architectures whose encoder the generated module implements."""

Tensors = dict[str, torch.Tensor]


def write_standalone(model: peft.PeftModel, folder: Path) -> None:
    """Write the weights of base model and blocks, and the code that joins them, into ``folder``.

    Raises ModelError when a block needs an SAE whose encoder the code does not implement.
    """
    if not any(isinstance(layer, IsaerftLayer) for layer in decoder_layers(model.get_base_model())):
        raise ModelError("a standalone export must be of an adapter at hook points but got lora, which merges: --merged.")
    base = model.get_base_model()
    layers_name = decoder_layers_name(base)
    sites, site_weights = [], nn.ModuleDict()
    for index, layer in enumerate(decoder_layers(base)):
        if isinstance(layer, IsaerftLayer):
            site_config, tensors = _site(layer)
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            sites.append({"layer": index, **site_config, "tensors": shapes})
            # copies: safetensors refuses tensors that share memory
            frozen = {name: nn.Parameter(t.detach().float().clone(), requires_grad=False) for name, t in tensors.items()}
            site_weights[str(index)] = nn.ParameterDict(frozen)
    unloaded: Any = model.unload()
    unloaded.isaerft = site_weights  # saved with the model's weights, under the names that the generated module uses
    # current parameter names: transformers renames legacy ones by model type, and this export has its own type
    unloaded.save_pretrained(folder, save_original_format=False)
    names = {"model_class": type(unloaded).__name__, "config_class": type(unloaded.config).__name__}
    code = jinja2.Template(asset(TEMPLATE).read_text(encoding="utf-8"), keep_trailing_newline=True)
    write_text(folder / f"{MODULE}.py", code.render(model_type=unloaded.config.model_type, **names))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        # its own type: without the custom code, loading must fail instead of silently dropping the blocks
        "model_type": f"isaerft_{unloaded.config.model_type}",
        "architectures": [f"Isaerft{names['model_class']}"],
        "auto_map": {
            "AutoConfig": f"{MODULE}.Isaerft{names['config_class']}",
            "AutoModelForCausalLM": f"{MODULE}.Isaerft{names['model_class']}",
        },
        "isaerft": {"layers": layers_name, "sites": sites},
    }
    write_json(folder / "config.json", config)


def _site(layer: IsaerftLayer) -> tuple[dict[str, Any], Tensors]:
    """One site's config and tensors: of the block and, where that reads latents, of the SAE."""
    name = layer.active_adapters[0]
    block, decoder = layer.isaerft_block[name], layer.decoder(name)
    if isinstance(block, BiasBlock):
        return {"kind": "bias"}, {"vector": block().float() @ decoder}
    if isinstance(block, LoreftBlock):
        raise ModelError("a standalone export must be of another kind than loreft. Publish the adapter: isaerft-sweep push.")
    encoder, tensors = _encoder(layer.saes[name].sae)
    tensors["W_dec"] = decoder
    if isinstance(block, ScaleBlock):
        return {"kind": "scale", **encoder}, {**tensors, "scale": block.scale}
    assert isinstance(block, FeedForwardBlock)
    return {"kind": "feed_forward", "maps": block.maps, **encoder}, {**tensors, **dict(block.named_parameters())}


def _encoder(sae: Any) -> tuple[dict[str, Any], Tensors]:
    architecture = sae.cfg.architecture()
    if architecture not in ENCODERS:
        raise ModelError(
            f"a standalone export must have an SAE of architecture {', '.join(ENCODERS)} but got '{architecture}'. A bias "
            "adapter needs no encoder; for the others publish the adapter itself: isaerft-sweep push."
        )
    tensors: Tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc}
    if sae.cfg.apply_b_dec_to_input:
        tensors["b_dec"] = sae.b_dec
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        tensors["decoder_norm"] = sae.W_dec.norm(dim=-1)
    if architecture == "jumprelu":
        tensors["threshold"] = sae.threshold
    return {"k": int(sae.cfg.k)} if architecture == "topk" else {}, tensors
