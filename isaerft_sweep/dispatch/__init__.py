"""Where trials run: processes on this machine's devices, or SLURM jobs, both through submitit."""
