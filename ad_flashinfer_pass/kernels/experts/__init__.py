"""Experts of a mixture-of-experts layer, in Triton."""
