"""What one forward pass works on: a flat batch of tokens, and the paged KV cache they read and write.

Knows tensors and block ids; does not know requests, schedulers or steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from engine.model_config import ModelConfig


@dataclass(slots=True)
class ForwardBatch:
    """The tokens of one step, request after request: prefills and prefill chunks first, then decodes.

    A request's rows are consecutive and in order of position. Lengths that steer Python loops are Python ints, so that
    a pass never waits for the device. Block tables are one padded tensor, so that a kernel can index them.
    """

    token_ids: torch.Tensor  # (tokens,) int64
    positions: torch.Tensor  # (tokens,) int64, from 0 in each request
    slots: torch.Tensor  # (tokens,) int64, block * block_size + offset: where the token's K and V are written
    query_start: list[int]  # (requests + 1,) first row of each request, then the number of tokens
    context_lens: list[int]  # (requests,) KV tokens after this step, the request's own rows included
    block_tables: torch.Tensor  # (requests, blocks of the longest) int32; what pads a row is never read
    sample_rows: torch.Tensor  # (samples,) int64, rows whose next token is wanted
    num_decodes: int  # the last so many requests have one row each


@dataclass(slots=True)
class KVCache:
    """The paged KV cache of all layers, in one allocation so that swapping a block moves one strided slice.

    K and V of a layer are beside each other, so that one gather by block table fetches both; within a block the token
    comes before the head, so that a token is written as one row, and gathered blocks read as one long sequence.
    Slots that no token was written to may hold anything, NaN included.
    """

    data: torch.Tensor  # (layers, 2, num_blocks, block_size, kv_heads, head_dim)
    layers: tuple[torch.Tensor, ...] = field(init=False)  # a view for each layer, made once

    def __post_init__(self) -> None:
        self.layers = self.data.unbind(0)

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVCache:
        """Reserve room for `num_blocks * block_size` tokens, uninitialised."""
        shape = (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        return cls(torch.empty(shape, dtype=dtype, device=device))

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.data.shape[3]
