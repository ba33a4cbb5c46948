"""A run's folder: found, written, read and checked, during the run and afterwards. No torch."""
