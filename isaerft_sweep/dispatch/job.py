"""What runs on the other side of a dispatch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrialJob:
    """A picklable call of one attempt of one trial.

    torch and transformers are imported inside ``__call__``: the controller that pickles this never loads them.
    """

    folder: str
    attempt: int
    threads: int | None
    device: str | None = None

    def __call__(self) -> str:
        if self.device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.device
        if self.threads:
            # several trials on one machine must share its cores: spinning threads slow each other down tenfold
            os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(self.threads)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from isaerft_sweep.journal.folders import Superseded, TrialFolder
        from isaerft_sweep.trial.run import run_trial

        try:
            return run_trial(TrialFolder(Path(self.folder)), self.attempt)
        except Superseded as error:
            print(f"ended: {error}", flush=True)
            return "superseded"
