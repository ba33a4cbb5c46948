"""Judges the answers of trained models: benchmarks, judges, win rates."""
