"""The loop: ask the sampler, dispatch, watch, tell, go on after anything."""
