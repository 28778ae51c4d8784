"""A run on disk: a folder of tables and a manifest, the same for both backends. `schema` has the tables' columns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.records.schema import (
    ADDED,
    ADDED_TO_SYSTEM,
    COLUMNS,
    KEYS,
    MANIFEST,
    MANIFEST_PARTS,
    SCHEMA_VERSION,
    Rows,
    arrow_type,
    check_references,
    column_rules,
    table_from_rows,
)
from engine.records.validation import Section, check_fields, check_table
from traces.errors import TandemError, check_no_pipe
from traces.outputs import check_writable, draft_of, publish
from traces.rows import errors_at

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH = 65536  # rows


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

        with pq.ParquetFile(check_no_pipe(self.folder / f"{name}.parquet")) as file:
            table = file.read(columns, use_threads=False)
        pa.default_memory_pool().release_unused()  # what reading took, and earlier tables
        return table

    def batches(self, name: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns of a table, some thousand rows at a time."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetFile(check_no_pipe(self.folder / f"{name}.parquet")) as file:
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
        self._folder, self._draft, self._overwrite = folder, draft_of(folder), overwrite
        self._files: dict[str, pq.ParquetWriter] = {}

    def __enter__(self) -> RunWriter:
        with self._complaining():
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
                path = self._draft / f"{name}.parquet"
                self._files[name] = pq.ParquetWriter(path, versioned.schema, **_encoding(name))
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
                text = json.dumps(header | content, indent=2) + "\n"
                (self._draft / f"{name}.json").write_text(text, encoding="utf-8")
            publish(self._draft, self._folder, self._overwrite)

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
    numbers = {name: "DELTA_BINARY_PACKED" for name, kind in kinds if kind == "int64"}
    words = [name for name, kind in kinds if kind == "string"]
    return {"compression": "zstd", "column_encoding": numbers, "use_dictionary": words}


def check_out(folder: Path, overwrite: bool = False) -> None:
    """Raises TandemError if a run may not be written to `folder`: something else is there, or a run that is to stay.

    Or if it could not be written.
    """
    is_run = (folder / "manifest.json").exists()
    if is_run and not overwrite:
        raise TandemError(f"{folder} holds a run: choose another --out, or add --overwrite to replace it")
    if folder.exists() and not is_run and (not folder.is_dir() or any(folder.iterdir())):
        raise TandemError(f"{folder} is not empty and not a run: choose another --out")
    check_writable(folder)


def read_run(folder: Path) -> RunRecords:
    """Read a run's folder.

    Raises:
        TandemError: it is not a run, a file is missing or damaged, or another schema version wrote it.
    """
    manifest, version = _read_json(folder / "manifest.json", MANIFEST)
    summary, _ = _read_json(folder / "summary.json", {})
    for part, types in MANIFEST_PARTS.items():
        if part in manifest:
            manifest[part] = check_fields(f"{folder / 'manifest.json'}: {part}", manifest[part], types)
    if "system" in manifest:
        for name, value in ADDED_TO_SYSTEM.get(version, {}).items():
            manifest["system"].setdefault(name, value)
    partial = manifest.pop("partial", False)
    tables = {name: _read_table(folder / f"{name}.parquet", name, version) for name in COLUMNS}
    with errors_at(folder):
        check_references(tables, partial, manifest.get("provenance", {}).get("backend") == "client")
    return RunRecords(manifest, tables, summary, partial)


def _read_table(path: Path, name: str, version: int) -> pa.Table:
    import pyarrow as pa

    try:
        table = StoredTables(path.parent)[name]
    except (OSError, pa.ArrowException) as error:
        raise TandemError(f"{path}: cannot be read ({_first_line(error)}); record the run again") from error
    columns, lacking = COLUMNS[name], ADDED.get(version, {}).get(name, {})
    if table.column_names != [each for each in columns if each not in lacking]:
        raise TandemError(f"{path}: columns are not those of schema {SCHEMA_VERSION}; record the run again")
    for place, added in enumerate(columns):
        if added in lacking:
            filled = pa.array([lacking[added]] * len(table), arrow_type(columns[added]))
            table = table.add_column(place, added, filled)
    with errors_at(path):
        check_table(table, column_rules(name), KEYS[name])
    return table


def _read_json(path: Path, types: Mapping[str, Any]) -> tuple[Section, int]:
    """A file's content, and its schema version."""
    try:
        content = json.loads(check_no_pipe(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TandemError(f"{path.parent} is not a run: it has no {path.name}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise TandemError(f"{path}: cannot be read ({_first_line(error)})") from error
    version = content.pop("schema", None) if isinstance(content, dict) else None
    if type(version) is not int or version not in (*ADDED, SCHEMA_VERSION):
        raise TandemError(f"{path}: not schema {SCHEMA_VERSION}; it was written by another version of tandem")
    return check_fields(str(path), content, types), version


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
