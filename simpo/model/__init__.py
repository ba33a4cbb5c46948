"""The policy: loaded, checked, its attention, log-probs, adapters, cost and replies."""
