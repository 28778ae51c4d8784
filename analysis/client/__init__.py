"""A load client for OpenAI-compatible servers."""
