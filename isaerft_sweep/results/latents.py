"""What adapters learned: the latents that moved, and how far trials agree about them. Reads what a trial's worker wrote."""

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
    """One site of one trial; the arrays are those of ``trial.latents.SiteChange``."""

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
        """The latents with the largest part in the steering vector, largest first; those that did not move are left out."""
        order = np.argsort(-np.abs(self.share), kind="stable")[:count]
        return [int(i) for i in order if self.moved[i] != 0]

    def link(self, latent: int) -> str | None:
        """The latent's page on Neuronpedia, for SAEs that are there."""
        return f"{NEURONPEDIA}/{self.neuronpedia_id}/{latent}" if self.neuronpedia_id else None


def read_latents(path: Path) -> list[SiteLatents]:
    """The sites in a trial's ``latents.npz``; none when it has not been written. Raises FolderError when it is broken."""
    if not path.is_file():
        return []
    names = ("moved", "vector", "share", "before", "after")
    try:
        with np.load(path) as arrays:
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
            f"{path} must hold what a trial recorded of its latents but cannot be read ({error}). Delete it: the trial is "
            "shown without it."
        ) from error


def cosines(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Cosines [n, n] between vectors; 0 for a vector of zeros."""
    stacked = np.stack(vectors).astype(float)
    norms = np.linalg.norm(stacked, axis=1, keepdims=True)
    unit = np.divide(stacked, norms, out=np.zeros_like(stacked), where=norms > 0)
    cosines: np.ndarray = np.clip(unit @ unit.T, -1, 1)
    return cosines


@dataclass(frozen=True)
class Agreement:
    """One latent across trials: in how many it is among the top ones, up or down, and its mean share of their vectors."""

    latent: int
    up: int
    down: int
    share: float


def agreement(sites: Sequence[SiteLatents], top: int = 50, count: int = 20) -> list[Agreement]:
    """The latents that most trials have among their ``top`` ones with the same sign, most agreed first."""
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
    """Labels of latents from a file, for an SAE of ``d_sae`` latents.

    ``.json``: an object from latent to label, or a list with one label (or null) for every latent. ``.csv``: columns
    ``latent`` and ``label``. Raises DataError when the file is none of these or is for an SAE of another width.
    """
    form = "a .json object {latent: label}, a .json list of labels, or a .csv with columns latent and label"
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                found = {int(row["latent"]): row["label"] for row in csv.DictReader(file)}
        else:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(raw, list) and len(raw) != d_sae:
                raise DataError(f"the labels in {path} must be for {d_sae} latents, but the list has {len(raw)}.")
            items = enumerate(raw) if isinstance(raw, list) else raw.items()
            found = {int(latent): str(label) for latent, label in items if label is not None}
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"the labels in {path} must be {form}, but they cannot be read: {error}.") from error
    outside = [latent for latent in found if not 0 <= latent < d_sae]
    if outside:
        raise DataError(
            f"the labels in {path} must be for an SAE of {d_sae} latents (0 to {d_sae - 1}), but one is for {outside[0]}. "
            "Take the labels of the SAE that was used."
        )
    return found
