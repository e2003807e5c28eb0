"""Checks before a sweep: the site, the downloads, the expected time."""
