"""Hyperparameter sweeps for preference fine-tuning with ISAERFT adapters. The Python API is in ``api.py``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from isaerft_sweep.version import __version__

if TYPE_CHECKING:
    from isaerft_sweep.api import Sweep, Trial, load_sweep, run

__all__ = ["Sweep", "Trial", "__version__", "load_sweep", "run"]


def __getattr__(name: str) -> Any:
    """The API is imported when it is used: every command and worker imports this package."""
    if name in __all__:
        return getattr(import_module("isaerft_sweep.api"), name)
    raise AttributeError(f"module 'isaerft_sweep' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
