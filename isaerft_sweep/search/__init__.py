"""W&B sweep files, the search spaces they describe, samplers and pruners."""
