"""What two prompts have in common, as a chain of hashes: one for each full KV block of a prompt.

A block's hash covers its tokens and, through the hash before it, all tokens before them: equal hashes mean equal keys
and values, for those of a token depend on everything up to it. (So does vLLM's automatic prefix caching.) The hash is
BLAKE2b's: the same on every machine, whatever PYTHONHASHSEED says.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from traces.request import TraceRequest


class Content(NamedTuple):
    """What a prompt's first tokens are: `ids[i]` stands for the tokens from `i * width` to `(i + 1) * width`.

    Token ids are ids of width 1; a trace's hash ids are wider, and so are the hashes of a prompt's KV blocks.
    """

    ids: Sequence[int]
    width: int

    @classmethod
    def of(cls, source: TraceRequest) -> Content | None:
        """What a trace says of a prompt, or None if it tells lengths only."""
        if source.prompt_token_ids is not None:
            return cls(source.prompt_token_ids, 1)
        return None if source.hash_ids is None else cls(source.hash_ids, source.hash_block_size)

    def hashes(self, prompt_len: int, block_size: int) -> Content:
        """The hash, below 2**63, of each full block of the prompt whose tokens are all known."""
        ids = array("q", self.ids)
        known = min(prompt_len, len(ids) * self.width)
        hashes, previous = array("q"), b""
        for end in range(block_size, known + 1, block_size):
            own = ids[(end - block_size) // self.width : -(-end // self.width)]
            previous = blake2b(previous + own.tobytes(), digest_size=8).digest()
            hashes.append(int.from_bytes(previous, "little") >> 1)
        return Content(hashes, block_size)
