"""The PEFT tuner: wraps the decoder layer of every hook point in an ``IsaerftLayer``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from isaerft_sweep.adapter.architecture import decoder_layers, decoder_layers_name
from isaerft_sweep.adapter.config import CONSTANT, ON_SAE, IsaerftConfig
from isaerft_sweep.adapter.layer import IsaerftLayer
from isaerft_sweep.adapter.merge import make_room
from isaerft_sweep.adapter.sae import check_fits, load_basis
from isaerft_sweep.errors import ConfigError


class IsaerftModel(BaseTuner):
    """A model with ISAERFT adapters; created by ``peft.get_peft_model(model, IsaerftConfig(...))``."""

    prefix = "isaerft_"
    tuner_layer_cls = IsaerftLayer
    target_module_mapping: ClassVar[dict[str, Any]] = {}

    def _prepare_adapter_config(self, peft_config: IsaerftConfig, model_config: dict[str, Any]) -> IsaerftConfig:
        if not peft_config.sites:
            raise ConfigError("sites must name at least one hook point, for example [{'layer': 20, 'sae_path': '/path'}].")
        return peft_config

    def _prepare_model(self, peft_config: IsaerftConfig, model: nn.Module) -> None:
        name, count = decoder_layers_name(model), len(decoder_layers(model))
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        width = embeddings.weight.shape[-1]
        for hook_point in peft_config.sites:
            sae = load_basis(peft_config.kind, hook_point, width)
            check_fits(sae, hook_point, width, count)
            if peft_config.kind in ON_SAE:
                hook_point["fingerprint"] = sae.fingerprint
        peft_config.target_modules = [f"{name}.{hook_point['layer']}" for hook_point in peft_config.sites]
        if getattr(model, "_require_grads_hooks", None):  # gradient checkpointing was enabled before
            model.disable_input_require_grads()  # type: ignore[operator]
        model.enable_input_require_grads = _do_nothing  # type: ignore[assignment]

    @staticmethod
    def _check_target_module_exists(peft_config: IsaerftConfig, key: str) -> bool:
        return key in (peft_config.target_modules or [])

    def _create_and_replace(
        self,
        peft_config: IsaerftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        hook_point = peft_config.sites[(peft_config.target_modules or []).index(current_key)]
        width = self.model.get_input_embeddings().weight.shape[-1]
        sae = load_basis(peft_config.kind, hook_point, width)
        if isinstance(target, IsaerftLayer):
            target.update_layer(adapter_name, peft_config, sae)
            return
        layer = IsaerftLayer(target, adapter_name, peft_config, sae)
        layer.train(target.training)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's version copies a weight; a decoder layer has none

    def _merging(self, names: list[str] | None) -> None:
        make_room(self.model, {self.peft_config[name].kind for name in names or self.active_adapters})

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge where it is exact (see ``merge.py``); ModelError elsewhere."""
        self._merging(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    @torch.no_grad()
    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter that changes the model by the weighted sum of what others change, exactly.

        Args:
            adapters: names of adapters that add a constant (bias, random, vector, diffmean), all of one kind and on the same
                hook points and SAEs.
            weights: as many, of any sign.
            adapter_name: of the new one, which is not active yet.

        Raises ConfigError when they do not fit together.
        """
        configs = [self.peft_config[name] for name in adapters]
        fitting = [(config.kind, config.sites) for config in configs]
        if len(adapters) != len(weights) or not adapters:
            raise ConfigError(f"there must be a weight for each adapter but got {len(weights)} for {len(adapters)}.")
        if adapter_name in self.peft_config:
            raise ConfigError(f"adapter_name must be new but '{adapter_name}' is there already.")
        if any(fits != fitting[0] for fits in fitting) or configs[0].kind not in CONSTANT:
            kinds = ", ".join(f"{name}: {config.kind}" for name, config in zip(adapters, configs, strict=True))
            raise ConfigError(
                f"adapters must be of one kind among {', '.join(CONSTANT)}, with the same hook points and SAEs, not {kinds}."
            )
        self.peft_config[adapter_name] = copy.deepcopy(configs[0])
        self.inject_adapter(self.model, adapter_name)
        for layer in self.modules():
            if isinstance(layer, IsaerftLayer):
                blocks: Any = layer.isaerft_block
                for name, weight in zip(adapters, weights, strict=True):
                    blocks[adapter_name].bias.add_(blocks[name].bias, alpha=weight)  # from zero

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> Any:
        if merge:
            self._merging(kwargs.get("adapter_names"))
        return super()._unload_and_optionally_merge(merge=merge, **kwargs)


def _do_nothing() -> None:
    """Replaces a model's ``enable_input_require_grads``.

    With gradient checkpointing, transformers, PEFT and TRL call it to make the embeddings' output require a gradient, so
    the backward pass would run through all frozen layers. Non-reentrant checkpointing does not need that: gradients end
    at the lowest hook point.
    """
