"""Quantized weights of checkpoints: one file a family of formats, and what reads and holds them all."""
