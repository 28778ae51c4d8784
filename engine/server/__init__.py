"""OpenAI-compatible API, given a backend. Nothing of the control plane may import it."""
