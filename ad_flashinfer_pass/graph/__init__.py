"""What knows FX alone: edits, axes, graphs as data and as text."""
