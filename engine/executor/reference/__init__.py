"""The operations of the data plane in plain PyTorch: the oracle, and the data plane of a machine without a GPU."""
