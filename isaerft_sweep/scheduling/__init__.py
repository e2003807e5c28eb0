"""Decides what a sweep does next, for the controller and the server. Pure: no files, clocks or processes."""
