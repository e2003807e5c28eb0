"""Adapters on their way out of a sweep's folder, or into ours from elsewhere."""
