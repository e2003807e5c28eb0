"""Names of runs and models: readable, unique, valid for W&B, the Hub and folders, and parsable.

The forms are those of the published run (see ``docs/reference.md``): ``run-gemma-2-2b-lr3.6e-05-beta0.2-20250228-2228``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path

from isaerft_sweep.errors import ConfigError

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
"""The characters of W&B's ids."""
HUB_LIMIT = 96
"""Longest repository id that the Hub accepts, in characters."""
MODEL_LIMIT = 24
"""Longest model part of a run name, in characters: what the Hub's limit leaves beside the longest suffix."""

ISAERFT_KINDS = ("bias", "scale", "linear", "mlp")

_PARSER = re.compile(
    r"^(?:(?P<upper>.+?)-FT-[A-Z]+-(?P<method>[A-Z]+)_)?(?P<prefix>run-)?(?P<model>.+)"
    r"-lr(?P<lr>\d\.\de-?\d{2,3})-beta(?P<beta>[0-9.]+(?:e[+-]?\d+)?)"
    r"-(?P<date>\d{8})-(?P<time>\d{4}(?:\d{2})?)(?:-(?P<mark>[0-9a-f]{6}))?$"
)


@dataclass(frozen=True)
class ParsedName:
    """The parts of a name. ``learning_rate`` has two digits; the trial's tags and config have all of them."""

    model: str
    learning_rate: float
    beta: float
    started: datetime
    prefix: str
    mark: str | None
    method: str | None = None
    """``ISAERFT``, or what was trained instead, such as ``LORA``; None in a run's name."""


@dataclass(frozen=True)
class NameSuffix:
    """What makes a run name unique.

    ``clashes``: how many shorter forms of the name are taken. 0: the published form; 1 adds the seconds; from 2 on the name
    also ends in six hex digits of a hash of the point, ``clashes`` and ``salt`` (the sweep's id and the trial's number).
    """

    clashes: int = 0
    salt: str = ""


PUBLISHED = NameSuffix()


def run_name(
    model: str,
    learning_rate: float,
    beta: float,
    started: datetime,
    *,
    prefix: str = "run-",
    suffix: NameSuffix = PUBLISHED,
) -> str:
    """The name of a run.

    Args:
        model: model name or Hub id; its last part is used.
        learning_rate: shown as ``{:.1e}``.
        beta: shown as it is (``0.2``); beyond six characters with four digits.
        started: shown to the minute.
        prefix: ``run-``, or empty as in the later published runs.
        suffix: makes the name unique.
    """
    if not (learning_rate > 0 and beta >= 0):
        raise ConfigError(f"a run name needs a learning rate above 0 and beta at least 0, got {learning_rate}, {beta}.")
    when = started.strftime("%Y%m%d-%H%M%S" if suffix.clashes else "%Y%m%d-%H%M")
    name = f"{prefix}{clean(model)[:MODEL_LIMIT].rstrip('-._')}-lr{learning_rate:.1e}-beta{show_beta(beta)}-{when}"
    name = name.replace("+", "")  # the Hub allows no plus sign: 1.0e00
    if suffix.clashes >= 2:
        hashed = f"{learning_rate!r}|{beta!r}|{suffix.salt}|{suffix.clashes}"
        name += "-" + sha256(hashed.encode()).hexdigest()[:6]
    return name


def method_name(kind: str) -> str:
    """What names and tags call an adapter of ``adapter.kind``: ``isaerft``, or the kind of those that are no ISAERFT."""
    return "isaerft" if kind in ISAERFT_KINDS else kind


def model_name(model: str, run: str, loss: str = "orpo", kind: str = "bias") -> str:
    """``GEMMA-2-2B-FT-ORPO-ISAERFT_run-…``: the repository's name; its first part is cut to the Hub's limit.

    Args:
        model: the base model's name, with or without its owner.
        run: the run's name.
        loss: ``orpo.loss``.
        kind: ``adapter.kind``.
    """
    method = f"-FT-{loss.upper()}-{method_name(kind).upper()}_"
    room = HUB_LIMIT - len(method) - len(run)
    return clean(model).upper()[:room].rstrip("-._") + method + run


NOT_TRAINED = ("prompt", "diffmean")
"""Kinds of adapter without learning rate and beta."""


def tags(learning_rate: float, beta: float, extra: tuple[str, ...] = (), kind: str = "bias") -> tuple[str, ...]:
    """Tags of the run and its card.

    Args:
        learning_rate: at full precision, as ``beta``.
        beta: of the loss.
        extra: of the config.
        kind: ``adapter.kind``; one that is not trained has neither learning rate nor beta.
    """
    if kind in NOT_TRAINED:
        return (*extra, method_name(kind))
    return ("generated_from_trainer", *extra, method_name(kind), f"lr_{learning_rate!r}", f"beta_{beta!r}")


def show_beta(beta: float) -> str:
    """``0.2`` as it is; a long one with four digits, since the tags hold it in full."""
    exact = repr(beta)
    return exact if len(exact) <= 6 else f"{beta:.4g}"


def clean(model: str) -> str:
    """The last part of a model's name with only characters that the Hub allows, and none of ``-._`` repeated."""
    last = re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    return re.sub(r"([-._])[-._]*", r"\1", re.sub(r"[^A-Za-z0-9._-]+", "-", last)).strip("-._") or "model"


def parse(name: str) -> ParsedName:
    """Parse a run name or model name. Raises ConfigError when it is neither."""
    match = _PARSER.match(name)
    if match is None:
        raise ConfigError(
            f"'{name}' is not a run name; one looks like run-gemma-2-2b-lr3.6e-05-beta0.2-20250228-2228, "
            "with or without run-, or with MODEL-FT-ORPO-ISAERFT_ before it."
        )
    when = datetime.strptime(match["date"] + match["time"], "%Y%m%d%H%M%S" if len(match["time"]) == 6 else "%Y%m%d%H%M")
    return ParsedName(match["model"], float(match["lr"]), float(match["beta"]), when, match["prefix"] or "", match["mark"],
                      match["method"])  # fmt: skip


def reserve(registry: Path, candidate: Callable[[int], str]) -> str:
    """Reserve the first free name of ``candidate(0)``, ``candidate(1)``, …, permanently.

    ``registry`` is a folder that all sweeps of one output folder share. A name is reserved by an empty file there, created
    exclusively: one process succeeds, on network file systems too. Case is ignored, as some file systems ignore it.
    """
    registry.mkdir(parents=True, exist_ok=True)
    clashes = 0
    while True:
        name = candidate(clashes)
        try:
            os.close(os.open(registry / name.lower(), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return name
        except FileExistsError:
            clashes += 1


def run_id(sweep_id: str, index: int) -> str:
    """The W&B run id of a trial: eight characters derived from its sweep and number, the same after any restart."""
    number = int.from_bytes(sha256(f"{sweep_id}/{index}".encode()).digest()[:8], "big")
    return "".join(ALPHABET[(number // 36**i) % 36] for i in range(8))
