"""Finds pairs that are better left out of training."""
