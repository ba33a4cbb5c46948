"""Loads and checks the policy, and computes its attention, loss, memory estimate and replies."""
