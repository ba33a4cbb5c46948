"""Preference pairs of a model's own replies: `generate` writes replies, `annotate` pairs them."""
