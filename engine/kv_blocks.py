"""Block accounting for the paged KV cache (PagedAttention, SOSP '23). Ids only: no tensor lives here.

Blocks are owned in plan order: a block released while planning step n may be given away in step n + 1
although step n is still running, because the data plane orders every access to the cache by plan.
"""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """The free blocks of one tier, handed out last-freed first so that runs are deterministic."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks that somebody owns."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens of one request take up."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks. Raises ValueError when fewer are free."""
        if count > len(self._free):
            raise ValueError(f"{count} KV blocks wanted, {len(self._free)} free")
        if count == 1:  # as most are
            return [self._free.pop()]
        taken = self._free[: -count - 1 : -1]
        del self._free[len(self._free) - count :]
        return taken

    def release(self, blocks: Iterable[int]) -> None:
        """Take blocks back."""
        self._free.extend(blocks)
