"""ISAERFT as a PEFT method: importing this package registers it."""

from isaerft_sweep.adapter.config import IsaerftConfig
from isaerft_sweep.adapter.load import load_model
from isaerft_sweep.adapter.model import IsaerftModel
from isaerft_sweep.adapter.peft_type import register

__all__ = ["IsaerftConfig", "IsaerftModel", "load_model"]

register(IsaerftConfig, IsaerftModel)
