"""Reads the records of a source, whatever their file and their shape, and checks them."""
