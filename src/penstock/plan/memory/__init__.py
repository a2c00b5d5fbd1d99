"""What a rank holds, and what may be computed again instead."""
