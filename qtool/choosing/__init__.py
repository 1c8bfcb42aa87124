"""Who gets how many bits, under one budget."""
