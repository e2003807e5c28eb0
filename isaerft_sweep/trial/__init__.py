"""One run: model, SAE, data, TRL's ORPOTrainer, checkpoints."""

import os
import warnings

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
# TRL's own defaults still use the old names of transformers' checkpointing options
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*is deprecated", category=FutureWarning)
