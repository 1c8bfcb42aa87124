"""What the stored parts of a weight mean: one codec per file, constant CODEC."""
