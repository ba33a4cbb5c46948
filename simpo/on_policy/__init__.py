"""Pairs out of a model's own replies: drawn by `draw`, scored and paired by `score`."""
