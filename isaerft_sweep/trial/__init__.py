"""One run: model, SAE, data, training loop, checkpoints."""
