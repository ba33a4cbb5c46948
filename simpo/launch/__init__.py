"""How runs are started: sweeps, here or on Slurm, and the ranks of one run."""
