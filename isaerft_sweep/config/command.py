"""Composing the config outside of Hydra's own main, for commands that take the same overrides as ``launch``."""

from __future__ import annotations

from collections.abc import Sequence

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from isaerft_sweep.config.boundary import to_experiment
from isaerft_sweep.config.schema import register
from isaerft_sweep.errors import ConfigError
from isaerft_sweep.resources import folder
from isaerft_sweep.specs import Experiment


def compose(overrides: Sequence[str]) -> Experiment:
    """The experiment that ``overrides`` describe. Raises ConfigError when they do not."""
    register()
    try:
        with hydra.initialize_config_dir(str(folder("conf")), version_base="1.3"):
            return to_experiment(hydra.compose("config", list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).strip()) from error
