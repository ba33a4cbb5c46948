"""Rounds of on-policy training: replies, scores, training, from the model of the round before."""
