"""Compose the config, then run the sweep it describes: ``python -m isaerft_sweep.launch model=… sweep=…``.

Started by ``wandb agent`` it runs the one trial that the agent asks for.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import hydra
import hydra.core.hydra_config
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from isaerft_sweep.config.compose import from_agent, with_present_names
from isaerft_sweep.config.composition_errors import explain
from isaerft_sweep.config.schema import register
from isaerft_sweep.guard import guarded
from isaerft_sweep.paths import folder

register()
detaching = False
failed = 0
"""The worst exit code among the sweeps of a ``--multirun`` that has gone on."""


@hydra.main(version_base="1.3", config_path=str(folder("conf")), config_name="config")
def main(config: Any) -> None:
    """Run the composed sweep; exit 2 on an error that the user can mend, 1 when no trial completed or one was given up, 130
    on Ctrl-C."""
    code = guarded(lambda: _run(config), "Stopped. The same command goes on.")
    if code in (1, 2) and hydra.core.hydra_config.HydraConfig.get().mode == RunMode.MULTIRUN:
        global failed
        failed = max(failed, code)  # the other sweeps are none the worse for it
    elif code:
        sys.exit(code)


def _run(config: Any) -> int:
    from isaerft_sweep.config.boundary import to_experiment

    experiment = to_experiment(config)
    overrides = hydra.core.hydra_config.HydraConfig.get().overrides.task
    if detaching:
        from isaerft_sweep.controller.session import detach

        return detach(experiment, overrides)
    elif "WANDB_SWEEP_ID" in os.environ:
        from isaerft_sweep.controller.agent import run_for_agent

        return run_for_agent(experiment, overrides, os.environ)
    else:
        from isaerft_sweep.controller.run_sweep import run_sweep

        return run_sweep(experiment, overrides)


def run() -> None:
    """The command line: Hydra's, and ``--detach``, which leaves the controller in the background."""
    global detaching
    detaching = "--detach" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--detach"]

    def composed() -> int:
        if "WANDB_SWEEP_ID" in os.environ:
            sys.argv[1:] = from_agent(sys.argv[1:], os.environ)
        sys.argv[1:] = with_present_names(sys.argv[1:])
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print in six lines
        try:
            main()
        except (HydraException, OmegaConfBaseException) as error:
            raise explain(error) from error
        return failed

    sys.exit(guarded(composed))


if __name__ == "__main__":
    run()
