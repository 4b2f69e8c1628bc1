"""Heads that guess tokens from the hidden states of a model: what they are made of, and their checkpoints."""
