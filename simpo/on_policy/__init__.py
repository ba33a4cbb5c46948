"""Makes preference pairs from a model's own replies: `generate` writes, `annotate` pairs them."""
