"""A small backend that speaks W&B's protocol: sweeps, agents and runs without W&B's cloud."""
