"""The demo model: its files, and in ``train.py`` how they were made."""
