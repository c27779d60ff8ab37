"""Pruning: mask patterns, and one file per method."""
