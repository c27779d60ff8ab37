"""Quantization: number grids, and one file per method."""
