"""What runs a transformed graph: pages, scheduler, sampling, text."""
