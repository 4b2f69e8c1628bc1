"""The demo model, in the files beside this; ``demo/train.py`` of the repository made them."""
