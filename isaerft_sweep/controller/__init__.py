"""Runs sweeps: the control loop, preflight, status, detached controllers, agents, retries."""
