"""Reading and writing checkpoints: sharded safetensors, lazily read, atomically written."""
