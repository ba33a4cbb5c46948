"""Starts runs: sweeps on this machine or on Slurm, and the ranks of one run."""
