"""W&B runs: their ids, groups and tags, online, offline or not at all."""
