"""The serving system: control plane here, data plane in `engine.executor`.

Nothing outside `engine/executor` and `engine/server` imports torch or triton.
"""
