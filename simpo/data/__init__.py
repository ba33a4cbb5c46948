"""Reads, checks, templates, tokenizes and packs preference records."""
