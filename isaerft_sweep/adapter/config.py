"""The adapter's config: what ``adapter_config.json`` holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, TaskType

from isaerft_sweep.adapter.peft_type import NAME
from isaerft_sweep.errors import ConfigError

KINDS = ("bias", "scale", "linear", "mlp")
SITE_KEYS = ("layer", "sae_release", "sae_id", "sae_path", "fingerprint")


@dataclass
class IsaerftConfig(PeftConfig):
    """ISAERFT: a trainable block on the latents of a frozen SAE at one or more hook points in the residual stream.

    Args:
        sites: one mapping per hook point: ``layer`` (index of the decoder layer whose output it is) and its SAE, by
            ``sae_release`` and ``sae_id`` (sae_lens) or by ``sae_path`` (a local folder). ``fingerprint`` is set when
            the SAE is first read and checked from then on.
        kind: ``bias`` (f + b), ``scale`` (f · (1 + s)), ``linear`` (f + Wf + c) or ``mlp`` (f + MLP(f)), each zero at
            the start, with f the SAE's latents of shape [batch, position, d_sae].
        rank: low-rank matrices of this rank for ``linear`` and ``mlp``; None: full matrices.
        hidden_size: width of the mlp's hidden layers; None: d_sae.
        hidden_layers: number of the mlp's hidden layers.
    """

    sites: list[dict[str, Any]] = field(default_factory=list)
    kind: str = "bias"
    rank: int | None = None
    hidden_size: int | None = None
    hidden_layers: int = 1
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        from peft.utils import PeftType

        self.peft_type = PeftType[NAME]
        self.task_type = TaskType.CAUSAL_LM
        if self.kind not in KINDS:
            raise ConfigError(f"kind must be one of {', '.join(KINDS)} but got '{self.kind}'.")
        if self.rank is not None and self.kind not in ("linear", "mlp"):
            raise ConfigError(f"rank must go with kind linear or mlp but got rank={self.rank} with kind={self.kind}.")
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
            if not isinstance(hook_point.get("layer"), int) or named == bool(hook_point.get("sae_path")):
                raise ConfigError(
                    "a hook point must have an integer layer and either sae_release with sae_id, or sae_path, "
                    f"but got {dict(hook_point)}."
                )
