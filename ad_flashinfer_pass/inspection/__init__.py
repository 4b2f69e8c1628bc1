"""Looking at what the pass does: graphs as data, their differences, memory plans, reports."""
