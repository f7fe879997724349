"""Where weights live and how they move: bytes and tensors, no tokens."""
