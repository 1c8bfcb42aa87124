"""The library of kernels/cpu: compiled, found, loaded, and what solvers call of it."""
