"""Block accounting for the paged KV cache (PagedAttention, SOSP '23). Ids only: no tensor lives here.

Blocks are owned in plan order: a block released while planning step n may be given away in step n + 1
although step n is still running, because the data plane orders every access to the cache by plan.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import takewhile


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

    def allocate_each(self, count: int) -> list[int]:
        """As `count` calls that hand out one."""
        return self.allocate(count)

    def release(self, blocks: Iterable[int]) -> None:
        """Take blocks back."""
        self._free.extend(blocks)


class PrefixCachingPool(BlockPool):
    """A pool whose blocks may have several owners, and stay known by the hash of what they hold when the last has left.

    Such a block is free as well as cached: it is evicted, least recently released first, once nothing else is free.
    """

    def __init__(self, num_blocks: int, block_size: int, keeps_equal: bool = False) -> None:
        """`keeps_equal`: of several blocks that hold the same, all stay known, and not the first alone."""
        super().__init__(num_blocks, block_size)
        self._keeps_equal = keeps_equal
        self._owners = [0] * num_blocks  # how many requests hold each block
        # hash -> the blocks that hold what it stands for, oldest first
        self._blocks_of: dict[int, dict[int, None]] = {}
        self._hash_of: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached blocks without an owner, next to be evicted first

    @property
    def free(self) -> int:
        """Blocks that nobody owns, cached or not."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that somebody owns."""
        return self.num_blocks - self.free

    def find(self, hashes: Sequence[int]) -> list[int]:
        """The cached blocks of the longest prefix of a chain of hashes."""
        known = takewhile(self._blocks_of.__contains__, hashes)
        return [next(iter(self._blocks_of[each])) for each in known]

    def idle(self, blocks: Sequence[int]) -> int:
        """How many of these cached blocks nobody owns: what `free` falls by if they are shared."""
        return sum(block in self._idle for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Give cached blocks one more owner."""
        for block in blocks:
            self._owners[block] += 1
            self._idle.pop(block, None)

    def publish(self, block: int, block_hash: int) -> None:
        """Let a block be found by the hash of what it holds, even if another is only where `keeps_equal`."""
        if block not in self._hash_of and (self._keeps_equal or block_hash not in self._blocks_of):
            self._blocks_of.setdefault(block_hash, {})[block] = None
            self._hash_of[block] = block_hash

    def withdraw(self, block: int) -> None:
        """Let a block not be found any more: what it was to hold will not be computed."""
        if (block_hash := self._hash_of.pop(block, None)) is not None:
            same = self._blocks_of[block_hash]
            del same[block]
            if not same:
                del self._blocks_of[block_hash]

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks of which nothing is known, evicting if need be. Raises ValueError as `BlockPool`."""
        for _ in range(min(count - len(self._free), len(self._idle))):
            self._evict()
        blocks = super().allocate(count)
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def allocate_each(self, count: int) -> list[int]:
        """As in `BlockPool`."""
        return [block for _ in range(count) for block in self.allocate(1)]

    def _evict(self) -> None:
        block, _ = self._idle.popitem(last=False)
        self.withdraw(block)
        self._free.append(block)

    def release(self, blocks: Iterable[int]) -> None:
        """Take a request's blocks back; its last are evicted before its first, of which others can make more use."""
        for block in reversed(tuple(blocks)):
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if block in self._hash_of:
                self._idle[block] = None
            else:
                self._free.append(block)
