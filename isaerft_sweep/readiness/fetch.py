"""``isaerft-sweep fetch``: fill the cache on a machine with internet, so that compute nodes need none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isaerft_sweep.config.boundary import to_definition, variants
from isaerft_sweep.controller.preflight import check_trial_needs
from isaerft_sweep.errors import ConfigError, ModelError
from isaerft_sweep.specs import Experiment, ModelSpec

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""Of a model's repository: no weights in other formats, which nothing here reads."""


def fetch(experiment: Experiment) -> Mapping[str, Any]:
    """Download model, tokenizer, SAEs and data, then check that a trial finds them offline; facts about them.

    Raises ModelError when something cannot be had.
    """
    on = [name for name in OFFLINE if os.environ.get(name, "0") not in ("", "0")]
    if on:
        raise ConfigError(
            f"{on[0]} must not be set while files are fetched. Run again with: env -u {on[0]} isaerft-sweep fetch …"
        )
    wanted = variants(experiment, to_definition(experiment.sweep, experiment))
    for name, revision in dict.fromkeys(one for variant in wanted for one in repositories(variant.model)):
        download(name, revision)
    check_trial_needs(*wanted)
    with offline():
        return check_trial_needs(*wanted)


def repositories(model: ModelSpec) -> list[tuple[str, str | None]]:
    """The Hub's repositories that a model comes from; none for a local folder or one that is made on the spot."""
    if model.source != "hub" or Path(model.name).expanduser().is_dir():
        return []
    own: list[tuple[str, str | None]] = [(model.name, model.revision)]
    return own + ([(model.tokenizer, None)] if model.tokenizer and not Path(model.tokenizer).is_dir() else [])


def download(name: str, revision: str | None) -> None:
    """A model's files into the Hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, revision=revision, allow_patterns=FILES)
    except Exception as error:  # httpx's and the Hub's own errors have no base in common
        raise ModelError(
            f"model.name must be a repository of the Hub that you may read, but '{name}' could not be fetched: "
            f"{str(error).splitlines()[0]} Check the name, your access (hf auth login) and the network."
        ) from error


@contextmanager
def offline() -> Iterator[None]:
    """Processes that are started in this block do not ask the network."""
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    try:
        yield
    finally:
        for name in OFFLINE:
            del os.environ[name]
