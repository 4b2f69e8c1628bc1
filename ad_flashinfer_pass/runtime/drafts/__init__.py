"""Who guesses the tokens that a step verifies, a file each, and whether that pays."""
