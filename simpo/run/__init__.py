"""Finds, writes, reads and checks the folder of a run. Imports no torch."""
