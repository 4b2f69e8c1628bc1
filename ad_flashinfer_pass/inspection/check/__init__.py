"""``check``: a transformed model beside the one it was made of, step by step."""
