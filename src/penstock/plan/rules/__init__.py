"""Which splits of an operator are right."""
