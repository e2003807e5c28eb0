"""W&B runs, online or offline: ids, groups, tags, uploads."""
