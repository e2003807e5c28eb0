"""Decides what a sweep does next. Pure: no files, clocks or processes; the controller and the server both use it."""
