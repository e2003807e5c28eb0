"""What to try: W&B sweep files, the space they describe, and the samplers that choose points in it."""
