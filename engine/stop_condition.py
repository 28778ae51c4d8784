"""Where a request ends, short of its `max_tokens`. A backend knows it; a scheduler does not."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple


class StopCondition(NamedTuple):
    """When a request's output is over.

    Attributes:
        ignore_eos: whether the model's stop tokens do not end it.
        min_tokens: output tokens before which they do not.
        output_len: output tokens at which it ends in any case, or None.
    """

    ignore_eos: bool = False
    min_tokens: int = 0
    output_len: int | None = None

    def ends(self, made: Sequence[int], stop_tokens: Container[int]) -> bool:
        """Whether these output tokens are all, where those are the model's stop tokens."""
        count = len(made)
        if count == self.output_len:
            return True
        return not self.ignore_eos and made[-1] in stop_tokens and count >= self.min_tokens
