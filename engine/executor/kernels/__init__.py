"""The operations of the data plane as Triton kernels, for NVIDIA GPUs; `ops` is the data plane, the rest its kernels.

Every kernel computes in float32, takes fp16, bf16 and fp32, and has its oracle in `engine.executor.reference`. What
changes from step to step is an ordinary argument, never a `constexpr`, so that nothing compiles while serving.
"""
