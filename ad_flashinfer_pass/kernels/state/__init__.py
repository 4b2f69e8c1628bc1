"""Layers with a state of fixed size a sequence: convolutions and recurrences, by torch."""
