"""The columns of trace files: ours, and those of published traces. Which field each fills, and in which unit.

No two formats give a name two meanings, but for `timestamp`: its unit is settled by the file (`Dialect.of`) or by the
user (`Reading.time_unit`). So a column is read alike in JSONL, JSON, Parquet and CSV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from traces.errors import TandemError
from traces.request import TraceRequest

Row = dict[str, Any]
Placed = tuple[str, Row]  # the place in a file, and what is there


class Batch(NamedTuple):
    """Some rows of a file.

    Attributes:
        rows: makes them, with the place of each.
        columns: the same as (n,) arrays of numbers, or of dates in nanoseconds, where there is nothing else in them but
            columns that are not read. None: look at the rows.
    """

    rows: Callable[[], Iterable[Placed]]
    columns: Mapping[str, npt.NDArray[Any]] | None = None

    @property
    def size(self) -> int:
        """How many rows `columns` have."""
        return max(map(len, (self.columns or {}).values()), default=0)


COLUMNS = [field.name for field in fields(TraceRequest)][1:]  # the id is the place in the file
ID_BYTES = {"prompt_token_ids": 4, "hash_ids": 8, "output_ids": 8}  # columns that hold lists of ids: of an id
FIELD_OF = {name: name for name in COLUMNS} | {  # a column of a file, and the field of `TraceRequest` that it fills
    "arrival_s": "arrival_ns",
    "timestamp": "arrival_ns",  # Mooncake, vLLM's timed_trace, Bailian, ServeGen
    "input_length": "prompt_len",
    "output_length": "output_len",
    "ttft_slo_ms": "ttft_slo_ns",
    "e2e_slo_ms": "e2e_slo_ns",
    "input_tokens": "prompt_len",  # ServeGen
    "output_tokens": "output_len",
    "TIMESTAMP": "arrival_ns",  # Azure
    "ContextTokens": "prompt_len",
    "GeneratedTokens": "output_len",
    "Timestamp": "arrival_ns",  # BurstGPT
    "Request tokens": "prompt_len",
    "Response tokens": "output_len",
    "arrived_at": "arrival_ns",  # Vidur
    "num_prefill_tokens": "prompt_len",
    "num_decode_tokens": "output_len",
    "arrival_timestamp": "arrival_ns",  # Splitwise
    "prompt_size": "prompt_len",
    "token_size": "output_len",
    "arrival_time_ns": "arrival_ns",  # LLMServingSim
    "input_toks": "prompt_len",
    "output_toks": "output_len",
    "input_tok_ids": "prompt_token_ids",
    "output_tok_ids": "output_ids",
}
UNITS_NS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
UNIT_WORDS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
UNIT_OF = {  # of columns whose name says it
    **{"arrival_ns": "ns", "arrival_s": "s", "arrival_time_ns": "ns"},
    **{"ttft_slo_ms": "ms", "e2e_slo_ms": "ms"},
}
SECONDS_IN = {"Timestamp": "BurstGPT", "arrived_at": "Vidur", "arrival_timestamp": "Splitwise"}
"""Columns of seconds whose name does not say so -> who publishes them."""
DATED = {"TIMESTAMP", "timestamp", *SECONDS_IN}  # may hold dates
WITHOUT_ARRIVALS = {"num_prefill_tokens", "duration"}
"""Columns of published lengths that come without arrivals: Vidur's, and ServeGen's offline traces."""
SESSIONS = "sub_requests"  # LLMServingSim's chains of requests


@dataclass(frozen=True, slots=True)
class Reading:
    """How a file is read, as far as it does not say so itself, and which part of it.

    Attributes:
        time_unit: of arrivals in a column that does not name its unit: s, ms, us or ns.
        hash_block_size: tokens that each of `hash_ids` stands for, where the file has no such column.
        requests: read no more than so many requests, the first of the file.
        from_s, to_s: keep the requests that arrive in this time, in seconds after the file's first; the time of the
            trace starts at `from_s`.

    Raises:
        TandemError: there is no such unit, or a number is out of range.
    """

    time_unit: str | None = None
    hash_block_size: int | None = None
    requests: int | None = None
    from_s: float | None = None
    to_s: float | None = None

    def __post_init__(self) -> None:
        if self.time_unit is not None and self.time_unit not in UNITS_NS:
            raise TandemError(f"--time-unit is '{self.time_unit}': choose {', '.join(UNITS_NS)}")
        for name in ("hash_block_size", "requests"):
            if (value := getattr(self, name)) is not None and not 1 <= value < 2**63:
                raise TandemError(f"--{name.replace('_', '-')} is {value}: give 1 or more")
        start_s, end_s = self.window_s
        if not 0 <= start_s < end_s or start_s >= 9e9:
            raise TandemError(f"--from {start_s:g} --to {end_s:g}: give two times in seconds, the earlier one first")

    @property
    def is_window(self) -> bool:
        """Whether only the requests of some time are kept."""
        return self.from_s is not None or self.to_s is not None

    @property
    def window_s(self) -> tuple[float, float]:
        """The first second, and the one after the last."""
        return self.from_s or 0.0, 9e9 if self.to_s is None else self.to_s


WHOLE = Reading()


class Window:
    """The time whose requests are wanted. It counts from the first arrival that is asked about."""

    def __init__(self, reading: Reading) -> None:
        self._bounds_ns = [round(at * 10**9) for at in reading.window_s] if reading.is_window else None
        self.start_ns: int | None = None

    def has(self, arrivals_ns: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """(n,): whether each of the arrivals is wanted."""
        if self._bounds_ns is None or not len(arrivals_ns):
            return np.ones(len(arrivals_ns), bool)
        start_ns, end_ns = self._bounds_ns
        if self.start_ns is None:
            self.start_ns = start_ns + int(arrivals_ns[0])
        since_ns = arrivals_ns - self.start_ns
        wanted: npt.NDArray[np.bool_] = (since_ns >= 0) & (since_ns < end_ns - start_ns)
        return wanted


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a file's columns do not name: the unit of `timestamp`, and the size of hash blocks.

    Attributes:
        publisher: whose traces are written so.
        unit: of `timestamp`.
        hash_block_size: tokens of a hash block.
        certain: whether the file shows it.
    """

    publisher: str
    unit: str
    hash_block_size: int
    certain: bool = True

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Dialect:
        """The dialect of a file, by its first rows.

        Mooncake and vLLM's timed_trace have the same columns. As many hash ids as a prompt has blocks of 512 tokens, or
        of 16, tell which it is.
        """
        names = {name for row in rows for name in row}
        if not {"chat_id", "parent_chat_id"}.isdisjoint(names):
            return BAILIAN
        if "input_tokens" in names:
            return SERVEGEN
        counts = [(row.get("input_length"), row.get("hash_ids")) for row in rows]
        hashed = [(length, len(ids)) for length, ids in counts if type(length) is int and isinstance(ids, Sequence)]
        fitting = [each for each in (MOONCAKE, TIMED_TRACE) if all(each.fits(*count) for count in hashed)]
        return fitting[0] if hashed and len(fitting) == 1 else UNCERTAIN

    def fits(self, length: int, hashes: int) -> bool:
        """Whether a prompt has so many hash blocks, the last of which need not be full."""
        return hashes == -(-length // self.hash_block_size)


MOONCAKE = Dialect("Mooncake's traces", "ms", 512)
TIMED_TRACE = Dialect("vLLM's timed_trace", "s", 16)
BAILIAN = Dialect("Bailian's traces", "s", 16)
SERVEGEN = Dialect("ServeGen's workloads", "s", 16)
UNCERTAIN = Dialect("Mooncake's traces", "ms", 512, certain=False)
