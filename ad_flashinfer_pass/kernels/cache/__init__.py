"""What writes the pages, and what says where they are."""
