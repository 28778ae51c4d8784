"""What a run writes down: a folder of tables and a manifest, the same for both backends.

`requests` has a row per request; `steps` per step; `spans` per prefill chunk and per stretch of decoding (from
it every token's time follows: a decoding request makes a token in each step of its span whose `decode_tokens`
is not 0); `iterations` per turn of the serving loop (from it a run can be replayed). Times are integer
nanoseconds since the run's start.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import FIRST_CHUNK, PLANNED, PROMPTS
from engine.step import DIGEST_BYTES
from traces.errors import TandemError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

SCHEMA_VERSION = 4
BATCH = 65536  # rows

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
        "outcome": "string",  # length, stop, cancelled, rejected, unfinished
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


_SINCE_4: dict[str, int | None] = {"output_ids": None, "refused": False, "cancel_event": None}
_SINCE_3: dict[str, int | None] = {
    "ttft_slo_ns": None,
    "e2e_slo_ns": None,
    "cached_tokens": 0,
    "hash_ids": None,
    "hash_block_size": None,
}
_ADDED: dict[int, dict[str, dict[str, int | None]]] = {
    2: {"requests": _SINCE_3 | _SINCE_4},
    3: {"requests": _SINCE_4},
}
"""Older schema versions that are read -> the columns that they lack, and what stands for them."""
_RULES_BEFORE_4 = {"admit": FIRST_CHUNK, "release": PLANNED, "prefix_rules": PROMPTS}
_ADDED_TO_SYSTEM = {2: {"prefix_caching": False} | _RULES_BEFORE_4, 3: _RULES_BEFORE_4}  # likewise, of a manifest

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
        arrays = [pa.array(column, _arrow_type(kind)) for column, kind in zip(values, columns.values(), strict=True)]
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


def _arrow_type(kind: str) -> Any:
    import pyarrow as pa

    return pa.list_(pa.int64()) if kind == _INTS else kind


@dataclass(slots=True)
class RunRecords:
    """One run.

    Attributes:
        manifest: what was run, in three parts: workload, system, provenance.
        tables: `requests`, `steps`, `spans`, `iterations`.
        summary: metrics and counts.
        partial: whether the run was interrupted.
    """

    manifest: dict[str, Any]
    tables: Mapping[str, pa.Table]
    summary: dict[str, Any] = field(default_factory=dict)
    partial: bool = False

    def select(self, table: str, *columns: str) -> pa.Table:
        """Some columns of a table; of one that lies on disk no more is read."""
        if isinstance(self.tables, StoredTables):
            return self.tables.select(table, columns)
        return self.tables[table].select(columns)

    def batches(self, table: str, *columns: str) -> Iterator[pa.Table]:
        """As `select`; of a table that lies on disk, no more is in memory than some thousand rows at a time."""
        if isinstance(self.tables, StoredTables):
            return self.tables.batches(table, columns)
        return iter([self.tables[table].select(columns)])

    def write(self, folder: Path, overwrite: bool = False) -> None:
        """Write the run, or nothing; `overwrite` as in `RunWriter`.

        Raises:
            TandemError: the folder holds a run or something else, or cannot be written.
        """
        with RunWriter(folder, overwrite) as writer:
            for name, table in self.tables.items():
                writer.add_table(name, table)
            writer.finish(self)


class StoredTables(Mapping[str, "pa.Table"]):
    """The tables of a run's folder, read whenever they are asked for.

    Attributes:
        folder: where they lie.

    Reading raises OSError or pyarrow.ArrowInvalid if a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> pa.Table:
        return self.select(name, None)

    def select(self, name: str, columns: Sequence[str] | None) -> pa.Table:
        """Some columns of a table, or all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.folder / f"{name}.parquet") as file:
            table = file.read(columns, use_threads=False)
        pa.default_memory_pool().release_unused()  # what reading took, and earlier tables
        return table

    def batches(self, name: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns of a table, some thousand rows at a time."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.folder / f"{name}.parquet") as file:
            if not file.metadata.num_rows:
                yield file.read(columns)
            for batch in file.iter_batches(BATCH, columns=columns, use_threads=False):
                yield pa.Table.from_batches([batch])
        pa.default_memory_pool().release_unused()

    def __iter__(self) -> Iterator[str]:
        return iter(COLUMNS)

    def __len__(self) -> int:
        return len(COLUMNS)


class RunWriter:
    """Writes a run's folder while the run goes on. With `overwrite`, an older run there is replaced once the new one is
    whole.

    A context, which leaves nothing behind unless `finish` was called in it. All of it raises a TandemError if the
    folder holds a run or something else, or cannot be written.
    """

    def __init__(self, folder: Path, overwrite: bool = False) -> None:
        check_out(folder, overwrite)
        self._folder, self._draft, self._overwrite = folder, folder.with_name(folder.name + ".tmp"), overwrite
        self._files: dict[str, pq.ParquetWriter] = {}

    def __enter__(self) -> RunWriter:
        with self._complaining():
            shutil.rmtree(self._draft, ignore_errors=True)
            self._draft.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._close()
        shutil.rmtree(self._draft, ignore_errors=True)

    def add(self, table: str, rows: Rows) -> None:
        """Append rows to a table."""
        self.add_table(table, table_from_rows(table, rows))

    def add_table(self, name: str, rows: pa.Table) -> None:
        """Append rows to a table."""
        import pyarrow.parquet as pq

        with self._complaining():
            versioned = rows.replace_schema_metadata({"tandem_schema": str(SCHEMA_VERSION)})
            if name not in self._files:
                self._files[name] = pq.ParquetWriter(
                    self._draft / f"{name}.parquet", versioned.schema, **_encoding(name)
                )
            if len(rows):
                self._files[name].write_table(versioned)

    def written(self) -> StoredTables:
        """End all tables; returns them."""
        with self._complaining():
            self._close()
        return StoredTables(self._draft)

    def finish(self, run: RunRecords) -> None:
        """Write a run's manifest and summary beside the tables that were added, and put the folder in its place."""
        header = {"schema": SCHEMA_VERSION, "partial": run.partial}
        with self._complaining():
            self._close()
            for name, content in (("summary", run.summary), ("manifest", run.manifest)):
                (self._draft / f"{name}.json").write_text(json.dumps(header | content, indent=2) + "\n")
            if self._overwrite:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._draft.rename(self._folder)

    def _close(self) -> None:
        for file in self._files.values():
            file.close()

    @contextmanager
    def _complaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TandemError(f"cannot write {self._folder}: {error.strerror or error}; nothing was kept") from error


def _encoding(table: str) -> dict[str, Any]:
    """Numbers as differences, words by dictionary: half the time and size of Parquet's defaults."""
    kinds = COLUMNS[table].items()
    numbers = {name: "DELTA_BINARY_PACKED" for name, kind in kinds if kind == _INT}
    words = [name for name, kind in kinds if kind == "string"]
    return {"compression": "zstd", "column_encoding": numbers, "use_dictionary": words}


def check_out(folder: Path, overwrite: bool = False) -> None:
    """Raises TandemError if a run may not be written to `folder`: something else is there, or a run that is to stay."""
    is_run = (folder / "manifest.json").exists()
    if is_run and not overwrite:
        raise TandemError(f"{folder} holds a run: choose another --out, or add --overwrite to replace it")
    if folder.exists() and not is_run and (not folder.is_dir() or any(folder.iterdir())):
        raise TandemError(f"{folder} is not empty and not a run: choose another --out")


def read_run(folder: Path) -> RunRecords:
    """Read a run's folder.

    Raises:
        TandemError: it is not a run, a file is missing or damaged, or another schema version wrote it.
    """
    import pyarrow as pa

    manifest, version = _read_json(folder / "manifest.json")
    summary, _ = _read_json(folder / "summary.json")
    stored = StoredTables(folder)
    tables = {}
    for name, columns in COLUMNS.items():
        path = folder / f"{name}.parquet"
        try:
            tables[name] = stored[name]
        except (OSError, pa.ArrowInvalid) as error:
            raise TandemError(f"{path}: cannot be read ({_first_line(error)}); record the run again") from error
        for added, value in _ADDED.get(version, {}).get(name, {}).items():
            filled = pa.array([value] * len(tables[name]), _arrow_type(columns[added]))
            tables[name] = tables[name].append_column(added, filled)
        if tables[name].column_names != list(columns):
            raise TandemError(f"{path}: columns are not those of schema {SCHEMA_VERSION}; record the run again")
    partial = manifest.pop("partial", False)
    if "system" in manifest:
        manifest["system"] = _ADDED_TO_SYSTEM.get(version, {}) | manifest["system"]
    return RunRecords(manifest, tables, summary, partial)


def _read_json(path: Path) -> tuple[dict[str, Any], int]:
    """A file's content, and its schema version."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise TandemError(f"{path.parent} is not a run: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise TandemError(f"{path}: cannot be read ({_first_line(error)})") from error
    version = content.pop("schema", None) if isinstance(content, dict) else None
    if version not in (*_ADDED, SCHEMA_VERSION):
        raise TandemError(f"{path}: not schema {SCHEMA_VERSION}; it was written by another version of tandem")
    return content, version


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
