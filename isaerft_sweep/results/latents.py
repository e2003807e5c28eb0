"""What adapters learned: the latents that moved, and how far trials agree on them. Reads ``latents.npz``."""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isaerft_sweep.errors import DataError, FolderError

NEURONPEDIA = "https://www.neuronpedia.org"


@dataclass(frozen=True)
class SiteLatents:
    """One site of one trial. Arrays as in ``SiteChange``: ``vector`` [d_in], the others [d_sae]."""

    layer: int
    d_sae: int
    tokens: int
    neuronpedia_id: str | None
    fingerprint: str
    moved: np.ndarray
    vector: np.ndarray
    share: np.ndarray
    before: np.ndarray
    after: np.ndarray

    @property
    def norm(self) -> float:
        """Length of the steering vector."""
        return float(np.linalg.norm(self.vector.astype(float)))

    def top(self, count: int) -> list[int]:
        """Up to ``count`` latents that moved, by their share of the steering vector, largest first."""
        order = np.argsort(-np.abs(self.share), kind="stable")[:count]
        return [int(i) for i in order if self.moved[i] != 0]

    def link(self, latent: int) -> str | None:
        """The URL of the latent on Neuronpedia; None for an SAE that Neuronpedia lacks."""
        return f"{NEURONPEDIA}/{self.neuronpedia_id}/{latent}" if self.neuronpedia_id else None


def read_latents(path: Path) -> list[SiteLatents]:
    """The sites in a trial's ``latents.npz``; empty without the file. Raises FolderError when it cannot be read."""
    if not path.is_file():
        return []
    names = ("moved", "vector", "share", "before", "after")
    try:
        with path.open("rb") as file, np.load(file) as arrays:  # np.load itself leaves a torn file open
            return [
                SiteLatents(
                    layer=site["layer"],
                    d_sae=site["d_sae"],
                    tokens=site["tokens"],
                    neuronpedia_id=site.get("neuronpedia_id"),
                    fingerprint=site.get("fingerprint", ""),
                    **{name: arrays[f"{site['layer']}.{name}"] for name in names},
                )
                for site in json.loads(str(arrays["sites"]))
            ]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise FolderError(
            f"{path} must hold the latents of a trial but cannot be read ({error}). Delete it: the trial is "
            "shown without it."
        ) from error


def cosines(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Cosines [n, n] between n ``vectors`` [d]; 0 for a zero vector."""
    stacked = np.stack(vectors).astype(float)
    norms = np.linalg.norm(stacked, axis=1, keepdims=True)
    unit = np.divide(stacked, norms, out=np.zeros_like(stacked), where=norms > 0)
    cosines: np.ndarray = np.clip(unit @ unit.T, -1, 1)
    return cosines


@dataclass(frozen=True)
class Agreement:
    """One latent across trials: in how many it is a top latent that went ``up`` or ``down``, and its mean share."""

    latent: int
    up: int
    down: int
    share: float


def agreement(sites: Sequence[SiteLatents], top: int = 50, count: int = 20) -> list[Agreement]:
    """The ``count`` latents that most trials have in their ``top`` with the same sign, most trials first."""
    d_sae = sites[0].d_sae
    up, down, share = (np.zeros(d_sae) for _ in range(3))
    for site in sites:
        chosen = np.array(site.top(top), dtype=int)
        up[chosen] += site.moved[chosen] > 0
        down[chosen] += site.moved[chosen] < 0
        share += site.share / len(sites)
    order = sorted(np.flatnonzero(up + down), key=lambda i: (-abs(up[i] - down[i]), -abs(share[i])))[:count]
    return [Agreement(int(i), int(up[i]), int(down[i]), float(share[i])) for i in order]


def read_labels(path: Path, d_sae: int) -> dict[int, str]:
    """Read the labels of an SAE with ``d_sae`` latents from a file.

    ``.json``: an object from latent to label, or a list with one label (or null) for every latent. ``.csv``: columns
    ``latent`` and ``label``. Raises DataError for another format or an SAE of another width.
    """
    expected_format = "a .json object {latent: label}, a .json list of labels, or a .csv with columns latent and label"
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                by_latent = {int(row["latent"]): row["label"] for row in csv.DictReader(file)}
        else:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(raw, list) and len(raw) != d_sae:
                raise DataError(f"the labels in {path} must be for {d_sae} latents, but the list has {len(raw)}.")
            items = enumerate(raw) if isinstance(raw, list) else raw.items()
            by_latent = {int(latent): str(label) for latent, label in items if label is not None}
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"the labels in {path} must be {expected_format}, but they cannot be read: {error}.") from error
    outside = [latent for latent in by_latent if not 0 <= latent < d_sae]
    if outside:
        raise DataError(
            f"the labels in {path} must be for an SAE of {d_sae} latents (0 to {d_sae - 1}), but one is for {outside[0]}. "
            "Use the labels of the sweep's SAE."
        )
    return by_latent
