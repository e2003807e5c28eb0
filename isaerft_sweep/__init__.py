"""Hyperparameter sweeps for preference fine-tuning with ISAERFT adapters."""

__version__ = "0.1.0"
