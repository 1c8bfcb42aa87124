"""Kernels of other libraries that `qtool bench` times beside ours: one library per file, PEERS."""
