"""Linears of few tokens."""
