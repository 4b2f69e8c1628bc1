"""Attention over pages: a provider a file, what each can do, and who gets a site."""
