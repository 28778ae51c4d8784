"""The shape of a model, and what follows from it."""
