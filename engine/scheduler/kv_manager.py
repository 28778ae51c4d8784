"""Which request owns which KV blocks: on the GPU, in host memory, and in the prefix cache.

The scheduler decides who gets blocks, and who loses them. The manager hands them out, and takes them back.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence

from engine.config import VLLM, ServingConfig
from engine.kv_blocks import BlockPool, PrefixCachingPool
from engine.request import Request
from engine.step import Copies


class KVManager:
    """The KV blocks of a run, on both tiers.

    Attributes:
        pool: the blocks on the GPU.
        cpu_pool: the blocks in host memory.
        shares_at_once: whether a block is shared from the very step that computes it, and outputs too.
        found: tokens that each request admitted by this step found in the prefix cache.
    """

    def __init__(self, config: ServingConfig) -> None:
        sizes = config.num_blocks, config.block_size
        self.shares_at_once = config.prefix_caching and config.prefix_rules == VLLM
        self._cache = PrefixCachingPool(*sizes, keeps_equal=self.shares_at_once) if config.prefix_caching else None
        self.pool = self._cache or BlockPool(*sizes)
        self.cpu_pool = BlockPool(config.num_cpu_blocks, config.block_size)
        self.found: dict[int, int] = {}
        self._block_size = config.block_size
        self._filled: dict[int, Request] = {}  # requests with a block of known tokens that nobody may share yet

    # -- growth ------------------------------------------------------------------------------------------

    def missing(self, request: Request, tokens: int) -> int:
        """Blocks that a request lacks for `tokens` more tokens; 0 or less if it lacks none."""
        return self.pool.blocks_for(request.computed + tokens) - len(request.blocks)

    def give(self, request: Request, count: int) -> list[int]:
        """Append free blocks to a request's. Raises ValueError when fewer are free."""
        blocks = self.pool.allocate(count)
        request.blocks += blocks
        return blocks

    def give_one_each(self, requests: Collection[Request]) -> dict[int, list[int]]:
        """Append a free block to the blocks of each of these. Raises ValueError when fewer are free."""
        given = {}
        for request, block in zip(requests, self.pool.allocate_each(len(requests)), strict=True):
            request.blocks.append(block)
            given[request.id] = [block]
        return given

    def release(self, request: Request) -> None:
        """Take back a request's GPU blocks."""
        self.pool.release(request.blocks)
        request.blocks = []

    # -- swap --------------------------------------------------------------------------------------------

    def can_swap_out(self, request: Request) -> bool:
        """Whether host memory has room for a request's cache."""
        return self.pool.blocks_for(request.computed) <= self.cpu_pool.free

    def swap_out(self, request: Request, blocks: Sequence[int]) -> Copies:
        """Give a request room in host memory for its cache, which lies in the first of `blocks`."""
        # The last of these may be for a token that it now will not make in this step.
        source = list(blocks[: self.pool.blocks_for(request.computed)])
        request.cpu_blocks = self.cpu_pool.allocate(len(source))
        request.preemptions += 1
        request.swaps += 1
        return Copies(source, request.cpu_blocks)

    def swap_in(self, request: Request) -> Copies:
        """Give a request GPU blocks for its cache; its host memory is given back once the step is planned."""
        copies = Copies(request.cpu_blocks, self.pool.allocate(len(request.cpu_blocks)))
        request.blocks, request.cpu_blocks = list(copies.target), []
        request.published = len(request.blocks)
        return copies

    def release_host(self, request: Request) -> None:
        """Take back a request's host memory."""
        self.cpu_pool.release(request.cpu_blocks)
        request.cpu_blocks = []

    # -- prefix caching ----------------------------------------------------------------------------------

    def enter(self, request: Request) -> None:
        """A request arrives; from now on its prompt's blocks are known by their hashes."""
        if self._cache and request.content:
            size, width = self._block_size, request.content.width
            request.block_hashes = request.content.hashes(request.prompt_len, size)
            # Of outputs hashes are known; of one run all must be hashes then, for a replay to find what it found.
            request.records_hashes = width != size if self.shares_at_once else width == 1

    def hits(self, request: Request) -> Sequence[int]:
        """The cached blocks that a waiting request begins with; its last token is always computed, for that samples."""
        hashes = request.block_hashes
        if self._cache is None or hashes is None:
            return ()
        return self._cache.find(hashes.ids[: (request.to_prefill - 1) // self._block_size])

    def owned(self, hits: Sequence[int]) -> int:
        """How many of these blocks others own, so that sharing them takes up no free block."""
        return len(hits) - self._cache.idle(hits) if self._cache else 0

    def share(self, request: Request, hits: Sequence[int]) -> None:
        """Give a request that is admitted the cached blocks that it begins with."""
        if self._cache and hits:
            self._cache.share(hits)
            request.blocks = [*hits]
            request.published = len(hits)
            self.found[request.id] = len(hits) * self._block_size
            request.prefilled(self.found[request.id])

    def count_found(self, request: Request) -> None:
        """Count what a request found in the cache; its step is planned."""
        request.cached_tokens += self.found.pop(request.id, 0)

    def publish(self, request: Request, tokens: int) -> None:
        """Let others share the blocks that a request's first `tokens` tokens fill, as far as these are known."""
        if self._cache and (hashes := request.block_hashes):
            last = min(tokens // hashes.width, len(hashes.ids))
            for place in range(request.published, last):
                self._cache.publish(request.blocks[place], hashes.ids[place])
            request.published = max(request.published, last)

    def watch(self, request: Request) -> None:
        """A running request has a block of known tokens that nobody may share yet."""
        self._filled[request.id] = request

    def publish_filled(self, decoding: Container[int]) -> None:
        """Let others share the known blocks that this step's decodes fill, or earlier ones did."""
        for request in [each for each in self._filled.values() if each.id in decoding]:
            self.publish(request, request.computed + 1)
            if request.block_hashes and request.published == len(request.block_hashes.ids):
                del self._filled[request.id]

    def unwatch(self, request: Request) -> None:
        """A request computes nothing more for now."""
        self._filled.pop(request.id, None)

    def withdraw(self, request: Request, computed: int) -> set[int]:
        """A request computes no more than `computed` tokens. Returns its blocks that nobody may find any more."""
        if self._cache is None or not self.shares_at_once:
            return set()
        written = computed // self._block_size
        unwritten = set(request.blocks[written : request.published])
        request.published = min(request.published, written)
        for block in unwritten:
            self._cache.withdraw(block)
        return unwritten
