"""The executor on an NVIDIA GPU."""
