"""Compares runs with each other and with published results, as text, csv, json or a web page."""
