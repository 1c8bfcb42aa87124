"""What a foreign program calls."""
