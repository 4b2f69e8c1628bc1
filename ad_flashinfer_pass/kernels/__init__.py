"""Kernel providers, one file each."""
