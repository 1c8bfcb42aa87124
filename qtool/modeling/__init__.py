"""Models seen as data: where their tensors are, what their layers are called."""
