"""Latency profiles: their format, and interpolation between measured points."""
