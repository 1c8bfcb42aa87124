"""What executes quantized weights: one backend per file, constant BACKEND."""
