"""One module for each command but train: its usage, its arguments and its `main`."""
