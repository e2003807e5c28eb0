"""SLURM: submits jobs, and every command of SLURM that the package runs."""
