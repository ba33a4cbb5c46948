"""The built-in preference pairs, written by code from a table of topics."""
