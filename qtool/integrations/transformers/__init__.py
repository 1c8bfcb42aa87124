"""What transformers calls: the quantizer, loading, generation."""
