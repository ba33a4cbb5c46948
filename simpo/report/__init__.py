"""Runs side by side: compared, beside published results, as text, csv, json or a web page."""
