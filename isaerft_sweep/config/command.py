"""Composing the config outside of Hydra's own main, for commands that take the same overrides as ``launch``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from isaerft_sweep.config.boundary import to_experiment
from isaerft_sweep.config.schema import register
from isaerft_sweep.errors import ConfigError
from isaerft_sweep.plain import overrides
from isaerft_sweep.resources import folder
from isaerft_sweep.specs import Experiment

VERSION = "wandb_version"


def from_agent(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """A command line of ``wandb agent``, which writes values as Python does (``None``), in Hydra's words."""
    try:
        file = Path(environment["WANDB_SWEEP_PARAM_PATH"])
        given = {
            key: entry["value"] for key, entry in yaml.safe_load(file.read_text(encoding="utf-8")).items() if key != VERSION
        }
    except (KeyError, OSError, yaml.YAMLError, TypeError, AttributeError):
        return list(arguments)
    words = dict(zip((f"{key}={value}" for key, value in given.items()), overrides(given), strict=True))
    return [words.get(argument, argument) for argument in arguments]


def compose(overrides: Sequence[str]) -> Experiment:
    """The experiment that ``overrides`` describe. Raises ConfigError when they do not."""
    register()
    try:
        with hydra.initialize_config_dir(str(folder("conf")), version_base="1.3"):
            return to_experiment(hydra.compose("config", list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).strip()) from error
