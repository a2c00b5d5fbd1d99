"""Which split is the fastest."""
