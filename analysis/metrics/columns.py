"""Record tables as arrays: columns, completed requests, kinds of steps, waits for arrivals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.records.run_folder import RunRecords
from engine.records.schema import COLUMNS
from engine.request import LENGTH, STOP

if TYPE_CHECKING:
    import pyarrow as pa

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

NS_PER_MS = 1e6
NS_PER_S = 1e9


def column(table: pa.Table, name: str) -> Ints:
    """An integer column without nulls, (rows,)."""
    return np.asarray(table[name].to_numpy(), np.int64)


def is_among(words: pa.ChunkedArray, chosen: Sequence[str]) -> Flags:
    """Where a column of strings has one of `chosen`, (rows,)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return np.asarray(pc.is_in(words, pa.array(chosen)).to_numpy())


def rows_where(table: pa.Table, chosen: Flags) -> pa.Table:
    """The chosen rows, and no copy of the table if these are all."""
    return table if chosen.all() else table.filter(chosen)


def by_request(table: pa.Table) -> pa.Table:
    """Sorted by request, and not copied if it is already."""
    ids = column(table, "request")
    return table if (ids[1:] >= ids[:-1]).all() else table.sort_by("request")


def step_rows(run: RunRecords, begin: int, end: int, *columns: str) -> pa.Table:
    """Rows `begin:end` of `steps`, with no more in memory than these."""
    import pyarrow as pa

    pieces: list[pa.Table] = []
    at = 0
    for batch in run.batches("steps", *columns):
        skip = max(0, begin - at)
        piece = batch.slice(skip, max(0, end - at - skip))
        if len(piece) or not pieces:  # the first has the columns, if nothing else
            pieces.append(piece)
        at += len(batch)
    return pa.concat_tables(pieces)


def is_completed(requests: pa.Table) -> Flags:
    """Which requests were served to their end, (rows,), from columns `outcome` and `last_token_ns`."""
    # In a run that was interrupted, a request's last token may be planned and its step not completed.
    known: Flags = requests["last_token_ns"].is_valid().to_numpy()
    return known & is_among(requests["outcome"], [LENGTH, STOP])


def completed_requests(
    run: RunRecords, ids: Ints | None = None, columns: Sequence[str] = tuple(COLUMNS["requests"])
) -> pa.Table:
    """The requests that were served to their end, or those among `ids`, by id. Latencies are taken over these."""
    table = run.select("requests", *dict.fromkeys((*columns, "request", "outcome", "last_token_ns")))
    done = by_request(rows_where(table, is_completed(table)))
    return done if ids is None else done.filter(np.isin(column(done, "request"), ids))


def completed_ids(run: RunRecords, ids: Ints | None = None) -> Ints:
    """Ids of the completed requests, or those among `ids`, ascending."""
    return column(completed_requests(run, ids, ("request",)), "request")


def step_kinds(steps: pa.Table) -> NDArray[np.str_]:
    """`prefill`, `decode`, `mixed` or `swap` for each step, (steps,)."""
    kinds = steps_of_kind(steps)
    return np.select([*kinds.values()], [*kinds], "swap")


def steps_of_kind(steps: pa.Table) -> dict[str, Flags]:
    """Which steps are of each kind, (steps,) each. A step of no kind is a swap."""
    prefill, decode = column(steps, "prefill_tokens") > 0, column(steps, "decode_tokens") > 0
    return {"prefill": prefill & ~decode, "decode": decode & ~prefill, "mixed": prefill & decode}


def waits_ns(run: RunRecords) -> Ints:
    """When the serving loop had nothing to do and began to wait for arrivals, (waits,)."""
    iterations = run.tables["iterations"]
    waits = iterations["step"].is_null().to_numpy() & iterations["completed_step"].is_null().to_numpy()
    return column(iterations.filter(waits), "now_ns")
