"""What Python, torch and accelerate keep once per process, although each trial of a pack needs its own."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
import torch
from accelerate.state import GradientState


@dataclass(frozen=True)
class ProcessState:
    """Output streams, random generators, whether gradients are recorded, and accelerate's place in its data loader."""

    streams: tuple[TextIO, TextIO]
    generators: tuple[Any, ...]
    cuda: list[torch.Tensor]
    records_gradients: bool
    gradient_state: dict[str, Any]

    @classmethod
    def now(cls) -> ProcessState:
        """The present state, copied."""
        # only where CUDA is in use already: asking would start it
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(
            (sys.stdout, sys.stderr),
            (random.getstate(), np.random.get_state(), torch.get_rng_state()),
            cuda,
            torch.is_grad_enabled(),
            {k: list(v) if isinstance(v, list) else v for k, v in GradientState._shared_state.items()},
        )

    def put(self) -> None:
        """Make this the process's state."""
        sys.stdout, sys.stderr = self.streams
        random.setstate(self.generators[0])
        np.random.set_state(self.generators[1])
        torch.set_rng_state(self.generators[2])
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        torch.set_grad_enabled(self.records_gradients)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self.gradient_state)
