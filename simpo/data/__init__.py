"""From raw records to packed rows: read, checked, templated, tokenized, packed."""
