"""Small cryptography: one concept per module, every key used once."""
