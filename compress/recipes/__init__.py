"""Preset recipes; ``--recipe NAME`` on the command line."""
