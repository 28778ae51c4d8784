"""The executor on a CPU."""
