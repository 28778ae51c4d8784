"""What two requests have in common, as a chain of hashes: one for each full KV block of a prompt, or of an output.

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


def chain_hash(previous: int | None, own: Sequence[int]) -> int:
    """The hash, below 2**63, of a block that holds `own` after one with the hash `previous`; None: it is the first."""
    before = b"" if previous is None else previous.to_bytes(8, "little")
    return int.from_bytes(blake2b(before + array("q", own).tobytes(), digest_size=8).digest(), "little") >> 1


class Content(NamedTuple):
    """What a request's first tokens are: `ids[i]` stands for the tokens from `i * width` to `(i + 1) * width`.

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

    def own(self, start: int, end: int) -> Sequence[int]:
        """The ids that stand for the tokens from `start` to `end`; fewer if these are not all known."""
        return self.ids[start // self.width : -(-end // self.width)]

    def hashes(self, tokens: int, block_size: int) -> Content:
        """The hash of each full block of the first `tokens` tokens, if all of its tokens are known."""
        known, hashes = min(tokens, len(self.ids) * self.width), array("q")
        for start in range(0, known - block_size + 1, block_size):
            hashes.append(chain_hash(hashes[-1] if hashes else None, self.own(start, start + block_size)))
        return Content(hashes, block_size)


def tells_blocks(source: TraceRequest, block_size: int) -> bool:
    """Whether a trace says what all KV blocks hold that a prompt fills: else none of the output can be found."""
    content = Content.of(source)
    return content is not None and len(content.ids) * content.width >= source.prompt_len // block_size * block_size


def with_output(source: TraceRequest, block_size: int) -> Content | None:
    """What a trace says of a prompt and its output; None if it does not tell all that blocks of the output follow."""
    content = Content.of(source)
    if content is None or source.output_ids is None or not tells_blocks(source, block_size):
        return None
    full = source.prompt_len // content.width
    return Content([*content.ids[:full], *source.output_ids], content.width) if len(content.ids) >= full else None
