"""Frozen SAEs: read by sae_lens release and id, from a local folder, from this package, or with random weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from isaerft_sweep.adapter.config import ON_STREAM
from isaerft_sweep.errors import ModelError, suggest
from isaerft_sweep.paths import asset
from isaerft_sweep.sae_folder import CONFIG, WEIGHTS, check_sae_folder

OWN_RELEASE = "isaerft-sweep"
"""The release of SAEs that ship with this package or (``random-64x256``: d_in 64, 256 latents) have random weights."""


@dataclass(frozen=True)
class FrozenSae:
    """A frozen SAE with an affine decoder: decode(f) = f @ decoder + constant.

    ``decoder`` has shape [d_sae, d_in]; ``encode`` maps [..., d_in] to latents [..., d_sae].
    """

    sae: Any
    decoder: torch.Tensor
    fingerprint: str
    origin: tuple[str | None, str | None, str | None] = (None, None, None)
    """Release, id and folder of origin."""
    basis: str = "sae"
    """``sae``; ``random``: directions of the same number and norms; ``stream``: the residual stream's own coordinates."""

    def __reduce__(self) -> Any:
        """Pickle as a reference: an SAE is not part of the adapter, and sae_lens's cannot be pickled."""
        if self.basis == "stream":
            return stream_basis, (self.d_in,)
        return _unpickled, (self.origin, self.fingerprint, self.basis)

    def __deepcopy__(self, _memo: Any) -> FrozenSae:
        return self  # immutable

    @property
    def d_sae(self) -> int:
        return self.decoder.shape[0]

    @property
    def d_in(self) -> int:
        return self.decoder.shape[1]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents of x [..., d_in], without a gradient for the SAE's own weights."""
        if self.basis == "stream":
            return x
        if self.sae.W_dec.device != x.device:
            self.sae.to(x.device)
        latents: torch.Tensor = self.sae.encode(x)
        return latents


def load_sae(hook_point: Mapping[str, Any]) -> FrozenSae:
    """The SAE of one hook point (an entry of ``IsaerftConfig.sites``), float32. Read once per process.

    Raises ModelError when it cannot be read, is not the one the adapter was trained with, or has no affine decoder.
    """
    frozen = _load(hook_point.get("sae_release"), hook_point.get("sae_id"), hook_point.get("sae_path"))
    expected = hook_point.get("fingerprint")
    if expected and expected != frozen.fingerprint:
        raise ModelError(
            f"the SAE must be the one that the adapter was trained with (fingerprint {expected}), but "
            f"{describe(hook_point)} has {frozen.fingerprint}. Point sae_path at the right folder, "
            "or use the release of the training."
        )
    return frozen


def load_basis(kind: str, hook_point: Mapping[str, Any], width: int) -> FrozenSae:
    """What an adapter of ``kind`` works on at a hook point of a residual stream of ``width``. Raises as ``load_sae``."""
    if kind in ON_STREAM:
        return stream_basis(width)
    frozen = load_sae(hook_point)
    return randomised(frozen) if kind == "random" else frozen


@lru_cache(maxsize=2)
def stream_basis(width: int) -> FrozenSae:
    """The residual stream's own coordinates."""
    return FrozenSae(None, torch.eye(width), "", basis="stream")


def randomised(frozen: FrozenSae) -> FrozenSae:
    """Random directions instead of the SAE's, as many and as long: the decoder that says nothing of the model."""
    directions = torch.randn(frozen.decoder.shape, generator=torch.Generator().manual_seed(0))
    norms = frozen.decoder.norm(dim=-1, keepdim=True).cpu() / directions.norm(dim=-1, keepdim=True)
    return replace(frozen, decoder=directions * norms, basis="random")


def describe(hook_point: Mapping[str, Any]) -> str:
    """The name of a hook point's SAE, for errors and cards."""
    return str(hook_point.get("sae_path") or f"{hook_point.get('sae_release')}/{hook_point.get('sae_id')}")


def check_fits(frozen: FrozenSae, hook_point: Mapping[str, Any], hidden_size: int, layers: int) -> None:
    """Raise ModelError unless the hook point's layer exists and its SAE has the width of the model's residual stream.

    Args:
        frozen: the SAE.
        hook_point: its entry in ``adapter.sites``.
        hidden_size: width of the residual stream.
        layers: number of decoder layers.
    """
    if not 0 <= hook_point["layer"] < layers:
        raise ModelError(
            f"a hook point's layer must be between 0 and {layers - 1} for this model but got {hook_point['layer']}. "
            "Set it: adapter.sites.N.layer, where N is its place in the list, from 0."
        )
    if frozen.d_in != hidden_size:
        raise ModelError(
            f"the SAE must read vectors as wide as the model's hidden size {hidden_size}, but {describe(hook_point)} reads "
            f"{frozen.d_in}. Choose one made for this model: sae_release and sae_id, or sae_path, in adapter.sites."
        )


@lru_cache(maxsize=8)
def _load(release: str | None, sae_id: str | None, path: str | None) -> FrozenSae:
    # sae_lens initialises random weights before reading: that must not change the adapter's own initial weights
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # sae_lens warns about transformer_lens flags that are unused here
        sae = _read(release, sae_id, path)
    name = path or f"{release}/{sae_id}"
    _check_kind(sae, name)
    sae.requires_grad_(False).eval()
    decoder = _affine_decoder(sae, name)
    digest = hashlib.sha256(decoder.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
    return FrozenSae(sae, decoder, digest, (release, sae_id, path))


def _unpickled(origin: tuple[str | None, str | None, str | None], fingerprint: str, basis: str = "sae") -> FrozenSae:
    """The SAE that a pickled model refers to."""
    frozen = load_sae(dict(zip(("sae_release", "sae_id", "sae_path"), origin, strict=True), fingerprint=fingerprint))
    return randomised(frozen) if basis == "random" else frozen


def _read(release: str | None, sae_id: str | None, path: str | None) -> Any:
    from sae_lens import SAE

    if path:
        return _from_folder(check_sae_folder(path))
    if release == OWN_RELEASE:
        return _shipped_or_random(str(sae_id))
    try:
        return SAE.from_pretrained(str(release), str(sae_id), dtype="float32")
    except Exception as error:  # each release has its own reader, which can raise anything
        offline = " HF_HUB_OFFLINE is set, so the Hub was not tried." if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ModelError(
            f"the SAE '{release}' / '{sae_id}' must be known to sae_lens and be in the Hub's cache or on a reachable "
            f"Hub.{offline} First reason: {first_line(error)} Check both names, or download "
            "it on a machine with internet, or give a local folder: sae_path=/path."
        ) from error


def _from_folder(folder: Path) -> Any:
    from sae_lens import SAE
    from sae_lens.registry import SAE_CLASS_REGISTRY

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    architecture = config.get("architecture", "standard")
    if architecture not in list(SAE_CLASS_REGISTRY):
        raise ModelError(
            f"{folder / CONFIG}: the SAE's architecture is unknown to sae_lens: {architecture!r}."
            + suggest(str(architecture), SAE_CLASS_REGISTRY)
        )
    try:
        sae = SAE.load_from_disk(folder, dtype="float32")
        with torch.no_grad():
            sae.encode(torch.zeros(1, sae.cfg.d_in))  # some values of the config are read only here
        return sae
    except Exception as error:  # a config that does not match its weights can raise anything
        raise ModelError(
            f"the SAE in {folder} cannot be read by sae_lens ({type(error).__name__}: {first_line(error)}). Its {CONFIG} "
            f"must describe what is in {WEIGHTS}."
        ) from error


def first_line(error: Exception) -> str:
    """An error's message in one line: its first two non-empty lines, or its repr."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or repr(error)


def _check_kind(sae: Any, name: str) -> None:
    """Raise ModelError unless ``sae`` reads and writes the same hook point and has finite weights."""
    architecture = sae.cfg.architecture()
    if "transcoder" in architecture or getattr(sae.cfg, "d_out", sae.cfg.d_in) != sae.cfg.d_in:
        raise ModelError(
            f"the SAE must read and write the same residual stream but {name} is a {architecture}, which reads one place "
            "and writes another. Choose an SAE of the residual stream."
        )
    bad = [key for key, tensor in sae.state_dict().items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ModelError(f"the SAE {name} must hold finite numbers but {bad[0]} has NaN or infinity. Copy its folder again.")


def _shipped_or_random(sae_id: str) -> Any:
    from sae_lens import SAE, StandardSAE, StandardSAEConfig

    size = re.fullmatch(r"random-([1-9]\d*)x([1-9]\d*)", sae_id)
    if size:
        sae = StandardSAE(StandardSAEConfig(d_in=int(size[1]), d_sae=int(size[2])))
        generator = torch.Generator().manual_seed(0)
        for parameter in sae.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / int(size[1]) ** 0.5
        return sae
    if not asset("sae", sae_id, "cfg.json").is_file():
        shipped = [p.name for p in asset("sae").iterdir() if p.is_dir()]
        raise ModelError(f"the release '{OWN_RELEASE}' has no SAE '{sae_id}'." + suggest(sae_id, shipped))
    return SAE.load_from_disk(asset("sae", sae_id), dtype="float32")


@torch.no_grad()
def _affine_decoder(sae: Any, name: str) -> torch.Tensor:
    """The matrix D [d_sae, d_in] with decode(f) = f @ D + decode(0), checked on random latents."""
    decoder = sae.W_dec.detach().float()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        decoder = decoder / decoder.norm(dim=-1, keepdim=True)
    if sae.cfg.normalize_activations == "none":
        latents = torch.rand(4, decoder.shape[0], generator=torch.Generator().manual_seed(0)).to(decoder.device)
        expected = sae.decode(latents) - sae.decode(torch.zeros_like(latents))
        if torch.allclose(latents @ decoder, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()):
            checked: torch.Tensor = decoder
            return checked
    raise ModelError(
        f"the SAE's decoder must be affine (one matrix and one offset for all tokens) but {name} "
        f"({sae.cfg.architecture()}, normalize_activations={sae.cfg.normalize_activations}) is not. Fold the "
        "normalisation into its weights, or choose another SAE."
    )
