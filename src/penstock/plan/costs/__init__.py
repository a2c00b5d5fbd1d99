"""What operators and ways take on a cluster."""
