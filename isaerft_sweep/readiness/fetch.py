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
"""Files of a model's repository. This package does not read weights in other formats."""


def fetch(experiment: Experiment) -> Mapping[str, Any]:
    """Download model, tokenizer, SAEs and data, check that a trial finds them offline, and return their descriptions.

    Raises ModelError when a download fails.
    """
    flags = [name for name in OFFLINE if os.environ.get(name, "0") not in ("", "0")]
    if flags:
        raise ConfigError(
            f"{flags[0]} must not be set while files are fetched. Run again with: env -u {flags[0]} isaerft-sweep fetch …"
        )
    experiments = variants(experiment, to_definition(experiment.sweep, experiment))
    for name, revision in dict.fromkeys(repo for variant in experiments for repo in repositories(variant.model)):
        download(name, revision)
    check_trial_needs(*experiments)
    with offline():
        return check_trial_needs(*experiments)


def repositories(model: ModelSpec) -> list[tuple[str, str | None]]:
    """The Hub repositories of a model as (name, revision); empty for a local folder or a generated model."""
    if model.source != "hub" or Path(model.name).expanduser().is_dir():
        return []
    repos: list[tuple[str, str | None]] = [(model.name, model.revision)]
    return repos + ([(model.tokenizer, None)] if model.tokenizer and not Path(model.tokenizer).is_dir() else [])


def download(name: str, revision: str | None) -> None:
    """Download a model's files into the Hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, revision=revision, allow_patterns=FILES)
    except Exception as error:  # errors of httpx and the Hub have no common base class
        raise ModelError(
            f"model.name must be a repository of the Hub that you may read, but '{name}' could not be fetched: "
            f"{str(error).splitlines()[0]} Check the name, your access (hf auth login) and the network."
        ) from error


@contextmanager
def offline() -> Iterator[None]:
    """Subprocesses started in this block use only the cache."""
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    try:
        yield
    finally:
        for name in OFFLINE:
            del os.environ[name]
