"""The shape of a model, and its graph sizes."""
