"""The simulated backend: a SimPy clock, and step times from a latency profile. Never imports torch."""
