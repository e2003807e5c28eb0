"""Compose the config, then run the sweep it describes: ``python -m isaerft_sweep.launch model=… sweep=…``.

Started by ``wandb agent`` it runs the one trial that the agent asks for.
"""

from __future__ import annotations

from isaerft_sweep import interrupts

interrupts.end_with_one_line()

import os
import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from isaerft_sweep.config.compose import from_agent, with_present_names
from isaerft_sweep.config.composition_errors import explain
from isaerft_sweep.config.schema import register
from isaerft_sweep.guard import guarded
from isaerft_sweep.paths import folder

register()


def run() -> None:
    """The command line: Hydra's, and ``--detach``, which leaves the controller in the background.

    The exit code is 0; 1 when no trial completed or one was given up; 2 after an error that the user can fix; 130 after
    Ctrl-C.
    """
    detaching = "--detach" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--detach"]
    failures = [0]
    """Exit codes of the sweeps of a ``--multirun`` that failed while the others continued."""

    @hydra.main(version_base="1.3", config_path=str(folder("conf")), config_name="config")
    def main(config: Any) -> None:
        code = guarded(lambda: run_composed(config, detaching), "Stopped. The same command resumes.")
        if code in (1, 2) and HydraConfig.get().mode == RunMode.MULTIRUN:
            failures.append(code)
        elif code:
            sys.exit(code)

    def compose_and_run() -> int:
        if "WANDB_SWEEP_ID" in os.environ:
            sys.argv[1:] = from_agent(sys.argv[1:], os.environ)
        sys.argv[1:] = with_present_names(sys.argv[1:])
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print in six lines
        try:
            main()
        except (HydraException, OmegaConfBaseException, ValueError) as error:  # of composing: ``main`` guards what follows
            raise explain(error) from error
        return max(failures)

    sys.exit(guarded(compose_and_run))


def run_composed(config: Any, detaching: bool) -> int:
    """Run what the composed config describes: a sweep, in the background when ``detaching``, or a W&B agent's trial."""
    from isaerft_sweep.config.boundary import to_experiment

    experiment = to_experiment(config)
    overrides = HydraConfig.get().overrides.task
    if detaching:
        from isaerft_sweep.controller.session import detach

        return detach(experiment, overrides)
    if "WANDB_SWEEP_ID" in os.environ:
        from isaerft_sweep.controller.agent import run_for_agent

        return run_for_agent(experiment, overrides, os.environ)
    from isaerft_sweep.controller.run_sweep import run_sweep

    return run_sweep(experiment, overrides)


if __name__ == "__main__":
    run()
