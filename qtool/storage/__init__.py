"""Files that are whole, digests that are remembered, values as JSON has them. Torch-free."""
