"""Low-rank approximation: rank arithmetic, and one file per method."""
