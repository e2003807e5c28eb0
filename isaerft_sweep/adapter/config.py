"""The adapter's config: what ``adapter_config.json`` holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, TaskType

from isaerft_sweep.adapter.peft_type import NAME
from isaerft_sweep.errors import ConfigError

ON_SAE = ("bias", "scale", "linear", "mlp", "random")
"""Kinds that need an SAE at each hook point."""
ON_STREAM = ("vector", "diffmean", "loreft", "prompt")
"""Kinds that change the residual stream itself, or nothing: what ISAERFT is compared with."""
KINDS = (*ON_SAE, *ON_STREAM)
CONSTANT = ("bias", "random", "vector", "diffmean")
"""Kinds that add the same vector to every token."""
WITH_RANK = ("linear", "mlp", "loreft")
LOREFT_RANK = 4
SITE_KEYS = ("layer", "sae_release", "sae_id", "sae_path", "fingerprint")


@dataclass
class IsaerftConfig(PeftConfig):
    """ISAERFT: a trainable block on the latents of a frozen SAE at one or more hook points in the residual stream.

    Args:
        sites: one mapping per hook point: ``layer`` (index of the decoder layer whose output it is) and its SAE, by
            ``sae_release`` and ``sae_id`` (sae_lens) or by ``sae_path`` (a local folder). ``fingerprint`` is set when
            the SAE is first read and checked from then on.
        kind: ``bias`` (f + b), ``scale`` (f · (1 + s)), ``linear`` (f + Wf + c) or ``mlp`` (f + MLP(f)), each zero at
            the start, with f the SAE's latents of shape [batch, position, d_sae]. For comparison: ``random`` (as bias, with
            a random decoder of the same row norms), ``vector`` and ``diffmean`` (x + b on the residual stream x, trained
            or set), ``loreft`` (x + Rᵀ(Wx + c − Rx), arXiv 2404.03592) and ``prompt`` (x: a system prompt instead).
        system_prompt: the text of kind ``prompt``; it is for whoever makes the prompts, the model does not read it here.
        rank: low-rank matrices of this rank for ``linear`` and ``mlp``, None: full matrices; rows of R, None: 4.
        hidden_size: width of the mlp's hidden layers; None: d_sae.
        hidden_layers: number of the mlp's hidden layers.
    """

    sites: list[dict[str, Any]] = field(default_factory=list)
    kind: str = "bias"
    rank: int | None = None
    hidden_size: int | None = None
    hidden_layers: int = 1
    system_prompt: str | None = None
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        from peft.utils import PeftType

        self.peft_type = PeftType[NAME]
        self.task_type = TaskType.CAUSAL_LM
        if self.kind not in KINDS:
            raise ConfigError(f"kind must be one of {', '.join(KINDS)} but got '{self.kind}'.")
        if self.rank is not None and self.kind not in WITH_RANK:
            raise ConfigError(f"rank must go with kind {', '.join(WITH_RANK)} but got {self.rank} with kind={self.kind}.")
        if (self.system_prompt is not None) != (self.kind == "prompt"):
            raise ConfigError(
                f"system_prompt must go with kind prompt but got {self.system_prompt!r} with kind={self.kind}."
            )
        if self.hidden_size is not None and self.kind != "mlp":
            raise ConfigError(f"hidden_size must go with kind mlp but got {self.hidden_size} with kind={self.kind}.")
        self._check_sites()

    def _check_sites(self) -> None:
        layers = [hook_point.get("layer") for hook_point in self.sites]
        if len(set(layers)) != len(layers):
            raise ConfigError(f"sites must have different layers but got {layers}.")
        for hook_point in self.sites:
            unknown = set(hook_point) - set(SITE_KEYS)
            if unknown:
                raise ConfigError(f"a hook point's keys must be among {', '.join(SITE_KEYS)} but got {sorted(unknown)}.")
            named = bool(hook_point.get("sae_release")) and bool(hook_point.get("sae_id"))
            has_sae = named != bool(hook_point.get("sae_path"))
            if not isinstance(hook_point.get("layer"), int) or (not has_sae and self.kind in ON_SAE):
                raise ConfigError(
                    "a hook point must have an integer layer and either sae_release with sae_id, or sae_path, "
                    f"but got {dict(hook_point)}."
                )
