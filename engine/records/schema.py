"""The tables of a run: their columns, and rows made into Arrow tables.

`requests` has a row per request; `steps` per step; `spans` per prefill chunk and per stretch of decoding (from
it every token's time follows: a decoding request makes a token in each step of its span whose `decode_tokens`
is not 0); `iterations` per turn of the serving loop (from it a run can be replayed). Times are integer
nanoseconds since the run's start.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import starmap
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import numpy as np

from engine.config import FIRST_CHUNK, PLANNED, PROMPTS, ServingConfig
from engine.records.validation import MOST_NS, MOST_TOKENS, Column
from engine.request import CANCELLED, FAILED, LENGTH, REJECTED, STOP
from engine.step import DIGEST_BYTES
from traces.errors import TandemError

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 4

NULL = -(2**63)  # stands for None in rows of `steps` and `iterations`
_PACKED = {"int64": ("q", "<i8"), "binary": (f"{DIGEST_BYTES}s", f"V{DIGEST_BYTES}")}  # as struct and as NumPy have it

_INT, _INTS = "int64", "int64[]"
COLUMNS: dict[str, dict[str, str]] = {
    "requests": {
        "request": _INT,
        "arrival_ns": _INT,
        "delivered_ns": _INT,  # when the serving loop took it
        "first_scheduled_ns": _INT,
        "first_token_ns": _INT,
        "last_token_ns": _INT,
        "prompt_len": _INT,
        "max_tokens": _INT,
        "predicted_length": _INT,
        "cancel_ns": _INT,
        "output_len": _INT,  # tokens that count
        "wasted_tokens": _INT,  # made after the stop token, before the scheduler knew of it
        "preemptions": _INT,
        "swaps": _INT,  # of the preemptions
        "outcome": "string",  # length, stop, failed, cancelled, rejected, unfinished
        "reason": "string",
        "priority": _INT,
        "client": "string",
        "ttft_slo_ns": _INT,
        "e2e_slo_ns": _INT,
        "cached_tokens": _INT,  # found in the prefix cache instead of being prefilled, each time it was admitted
        "hash_ids": _INTS,  # with prefix caching: which prompts begin alike, as in a trace
        "hash_block_size": _INT,
        "output_ids": _INTS,  # where outputs are cached too: likewise, of the blocks after those of the prompt
        "refused": "bool",  # rejected because the backend could not take it, whatever the limits
        "cancel_event": _INT,  # which of the run's events its cancellation was, in order of delivery, from 0
    },
    "steps": {
        "step": _INT,
        "digest": "binary",
        "scheduled_ns": _INT,  # the iteration's clock read
        "planned_ns": _INT,
        "launched_ns": _INT,
        "prefill_tokens": _INT,
        "chunks": _INT,
        "decode_tokens": _INT,
        "kv_tokens": _INT,  # context of the decodes
        "kv_blocks_used": _INT,
        "running": _INT,
        "waiting": _INT,
        "preemptions": _INT,
        "swapped_out_blocks": _INT,
        "swapped_in_blocks": _INT,
        "completed_ns": _INT,
        "device_start_ns": _INT,
        "device_ns": _INT,
    },
    "spans": {
        "request": _INT,
        "first_step": _INT,
        "last_step": _INT,
        "kind": "string",  # prefill, decode
        "start": _INT,  # cached tokens when it began
        "tokens": _INT,  # run in each step
        "samples": "bool",  # whether each step makes an output token
    },
    "iterations": {
        "now_ns": _INT,
        "events": _INT,
        "step": _INT,
        "planned_ns": _INT,
        "launched_ns": _INT,
        "completed_step": _INT,
        "completed_ns": _INT,
    },
}


_NULLABLE = {
    "requests": {
        *("first_scheduled_ns", "first_token_ns", "last_token_ns", "predicted_length", "cancel_ns", "reason", "client"),
        *("ttft_slo_ns", "e2e_slo_ns", "hash_ids", "hash_block_size", "output_ids", "cancel_event"),
    },
    "iterations": {"step", "planned_ns", "launched_ns", "completed_step", "completed_ns"},
}
_WORDS = {"outcome": (LENGTH, STOP, FAILED, CANCELLED, REJECTED, "unfinished"), "kind": ("prefill", "decode")}
KEYS = {"requests": ("request",), "steps": ("step",), "spans": ("request", "first_step", "start"), "iterations": ()}
"""Columns in which no two rows of a table are equal."""


def column_rules(table: str) -> dict[str, Column]:
    """What the columns of a table may hold."""
    nullable, rules = _NULLABLE.get(table, set()), {}
    for name, kind in COLUMNS[table].items():
        words = _WORDS.get(name, ())
        most, least = (MOST_NS if name.endswith("_ns") else MOST_TOKENS), -MOST_NS if name == "priority" else 0
        rules[name] = Column(kind, name in nullable, least, MOST_NS if name == "priority" else most, words)
    return rules


MANIFEST: dict[str, Any] = {"partial": bool, "workload": dict, "system": dict, "provenance": dict}
"""The parts of a manifest -> their types; and of each part the fields that are read."""
MANIFEST_PARTS: dict[str, dict[str, Any]] = {
    "workload": {
        **dict.fromkeys(("trace", "model", "dtype"), str),
        **{"requests": int, "model_shape": dict, "stop_rule": Literal["trace", "model"]},
    },
    "system": {"device": str, "scheduler_parameters": dict, "scheduler_source": dict[str, str]}
    | get_type_hints(ServingConfig),
    "provenance": {"backend": str | None, "profile": str | None, "machine": dict | None},
}


def check_references(tables: Mapping[str, pa.Table], partial: bool, by_client: bool) -> None:
    """Check what the tables of a run say of each other's rows.

    Raises:
        TandemError: steps are missing, a span is of no request or no step, or a completed request has no times.
    """
    import pyarrow.compute as pc

    requests, steps, spans = (tables[name] for name in ("requests", "steps", "spans"))
    if not by_client:  # who sees no turns
        _check_turns(tables["iterations"], len(steps))
    if len(steps) and pc.max(steps["step"]).as_py() != len(steps) - 1:
        raise TandemError(f"steps.parquet has {len(steps)} rows, and its last step is another: rows are missing")
    completed = requests.filter(pc.field("outcome").isin([LENGTH, STOP]))
    for name in ("first_scheduled_ns", "first_token_ns", "last_token_ns"):
        if completed[name].null_count:
            raise TandemError(f"requests.parquet: a request has completed, and has no {name}")
    if not len(spans):
        return
    if not pc.all(pc.is_in(spans["request"], requests["request"].combine_chunks())).as_py():
        raise TandemError("spans.parquet: a span is of a request that is not in requests.parquet")
    in_flight = 2 if partial else 0
    if pc.max(spans["last_step"]).as_py() >= len(steps) + in_flight:
        raise TandemError("spans.parquet: a span is of a step that is not in steps.parquet")
    if pc.any(pc.less(spans["last_step"], spans["first_step"])).as_py():
        raise TandemError("spans.parquet: a span ends before it begins")


_TURN_TIMES = ("now_ns", "planned_ns", "launched_ns", "completed_ns")


def _check_turns(iterations: pa.Table, steps: int) -> None:
    """Turns of the loop launch and complete the steps one after the other, in the order of time."""
    import pyarrow.compute as pc

    columns = [iterations[name].fill_null(-1).to_numpy() for name in _TURN_TIMES]
    times = np.stack(columns, axis=1).ravel()
    known = times[times >= 0]
    if (known[1:] < known[:-1]).any():
        raise TandemError("iterations.parquet: time runs backwards")
    for step, *of_step in (("step", "planned_ns", "launched_ns"), ("completed_step", "completed_ns")):
        for name in of_step:
            if not pc.is_null(iterations[name]).equals(pc.is_null(iterations[step])):
                raise TandemError(f"iterations.parquet: {name} and {step} are not known in the same rows")
        seen = iterations[step].drop_null().to_numpy()
        if len(seen) < steps or (seen != np.arange(len(seen))).any():
            raise TandemError(f"iterations.parquet: {step} does not name all steps one after the other")


_SINCE_4: dict[str, int | None] = {"output_ids": None, "refused": False, "cancel_event": None}
_SINCE_3 = dict.fromkeys(("ttft_slo_ns", "e2e_slo_ns", "hash_ids", "hash_block_size")) | {"cached_tokens": 0}
ADDED = {2: {"requests": _SINCE_3 | _SINCE_4}, 3: {"requests": _SINCE_4}}
"""Older schema versions that are read -> the columns that they lack, and what stands for them."""
_RULES_BEFORE_4 = {"admit": FIRST_CHUNK, "release": PLANNED, "prefix_rules": PROMPTS}
ADDED_TO_SYSTEM: dict[int, dict[str, Any]] = {
    2: {"prefix_caching": False} | _RULES_BEFORE_4,
    3: _RULES_BEFORE_4,
}  # likewise, of a manifest

Row = tuple[Any, ...]  # of a table, its fields in the order of `COLUMNS`
Rows = Sequence[Row] | bytearray  # or, of `steps` and `iterations`, as `packer` packs them


def packer(table: str) -> Callable[..., bytes]:
    """What takes the fields of a row of `steps` or `iterations`, and returns its bytes."""
    return struct.Struct("<" + "".join(_PACKED[kind][0] for kind in COLUMNS[table].values())).pack


def tables_from_rows(rows: Mapping[str, Rows]) -> dict[str, pa.Table]:
    """Turn rows by table into Arrow tables."""
    return {name: table_from_rows(name, rows[name]) for name in COLUMNS}


def table_from_rows(table: str, rows: Rows) -> pa.Table:
    """Turn rows into an Arrow table."""
    import pyarrow as pa

    columns = COLUMNS[table]
    if {"string", "bool"}.isdisjoint(columns.values()):
        packed = rows if isinstance(rows, bytearray) else b"".join(starmap(packer(table), rows))
        arrays = _numeric_arrays(columns, packed)
    else:
        values = list(zip(*rows, strict=True)) or [()] * len(columns)
        arrays = [pa.array(column, arrow_type(kind)) for column, kind in zip(values, columns.values(), strict=True)]
    return pa.table(arrays, names=list(columns))


def _numeric_arrays(columns: Mapping[str, str], packed: bytes | bytearray) -> list[pa.Array]:
    """Columns of packed rows, in a third of the time that Arrow takes for Python objects."""
    import pyarrow as pa

    rows = np.frombuffer(packed, [(name, _PACKED[kind][1]) for name, kind in columns.items()])
    arrays = []
    for name, kind in columns.items():
        values = np.ascontiguousarray(rows[name])
        if kind == "binary":
            digests = [None, pa.py_buffer(values)]
            arrays.append(pa.Array.from_buffers(pa.binary(DIGEST_BYTES), len(rows), digests).cast(kind))
        else:
            null = values == NULL
            arrays.append(pa.array(values, mask=null if null.any() else None))
    return arrays


def arrow_type(kind: str) -> Any:
    """The Arrow type of a column of `COLUMNS`."""
    import pyarrow as pa

    return pa.list_(pa.int64()) if kind == _INTS else kind
