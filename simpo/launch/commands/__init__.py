"""One module for each command but train: its usage, its words, and what it does with them."""
