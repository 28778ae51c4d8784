"""Comparisons of runs, as numbers."""
