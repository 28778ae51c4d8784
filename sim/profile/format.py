"""Latency profiles: the format, reading and writing.

A profile is one hardware x model shape x dtype: a folder of Parquet tables of measured times, and a `meta.yaml`
that says what was measured, where, how, and how well the tables predict points that were held out of them.
All times are microseconds for one step of the whole model (all layers).
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.model.config import ModelConfig
from engine.model.files import first_line
from engine.records.validation import is_a
from sim.profile.meta import ProfileMeta
from traces.errors import TandemError, check_no_pipe
from traces.outputs import check_writable, draft_of, publish
from traces.rows import errors_at

SCHEMA_VERSION = 3
BEFORE_3 = {"served": "in_service", "unevenness": "imbalance", "load": "power"}
"""Names of tables, columns and entries in profiles of schema 2, which are read -> those of today."""
FASTEST_BYTES_PER_US = 50e6  # 50 TB/s: memory that is several times faster than any there is
SHIPPED = Path(__file__).parents[1] / "profiles"  # hardware/model

# table -> key columns; every table also has `time_us` and `spread` (interquartile range / median of the repeats)
TABLES: dict[str, tuple[str, ...]] = {
    "dense": ("op", "tokens"),  # everything whose cost depends on the number of tokens in the step alone
    "prefill_attention": ("chunk", "context"),  # one request's chunk over `context` earlier tokens
    # All decodes of a step. `kv_tokens` is the sum of their contexts, `imbalance` their context imbalance: mean square
    # over squared mean.
    "decode_attention": ("sequences", "kv_tokens", "imbalance"),
    "head": ("samples",),  # final norm, language-model head and sampling
    # By kind of step: decode, prefill (mixed too), or any. The sequences of a prefill are those with a chunk in it: the
    # others cost the host little.
    "host": ("term", "kind", "sequences"),
}
IN_SERVICE = "in_service"
OPTIONAL_TABLES: dict[str, tuple[str, ...]] = {
    "graph": ("kind", "rows"),  # a whole captured step (`decode`, `mixed`) of so many rows that attends to nothing
    IN_SERVICE: ("kind", "rows"),  # the same in service: at no load, and in a column `slowed_us` what full load adds
    "swap": ("direction", "blocks"),  # copies of KV blocks between the tiers, `out` to host memory and back `in`
    # The part of decodes in the attention of a step that prefills too, for kernels that attend to both in one launch.
    "mixed_decode_attention": ("sequences", "kv_tokens"),
    "held_out": ("chunks", "decodes"),  # batches that are in no other table: (tokens, context) of chunks, contexts
}
KEYS = TABLES | OPTIONAL_TABLES
# now -> plan made -> launched; device end -> noticed; noticed -> next clock read; event due -> clock read
HOST_TERMS = ("plan", "launch", "notice", "turn", "wake")
HOST_TERMS_BY_KIND = ("plan", "launch")  # the others do not depend on what a step runs
MEASURE, CALIBRATE = "measure the profile again", "calibrate the profile again (tandem profile calibrate)"

Row = dict[str, Any]
Points = dict[tuple[Any, ...], float]  # time (us, all layers) by a table's keys


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile in memory: what it says of itself, and rows by table."""

    meta: ProfileMeta
    tables: dict[str, list[Row]]

    def __post_init__(self) -> None:
        for table, keys in KEYS.items():
            if table in TABLES or table in self.tables:
                _check_table(table, keys, self.tables.get(table, []))
        if "graph" in self.tables and self.meta.graphs is None:
            raise TandemError(f"profile table graph needs the entry graphs: {MEASURE}")
        if (IN_SERVICE in self.tables) != (self.meta.power is not None):
            raise TandemError(f"profile table {IN_SERVICE} and the entry power go together: {CALIBRATE}")
        missing = set(HOST_TERMS) - {row["term"] for row in self.tables["host"]}
        if missing:
            raise TandemError(f"profile table host: no {', '.join(sorted(missing))}; {MEASURE}")

    @property
    def name(self) -> str:
        """What was measured, for people."""
        return f"{self.model.name} {self.meta.dtype} on {self.meta.device}"

    @property
    def model(self) -> ModelConfig:
        """The shape that was measured."""
        return self.meta.model


def rows_of(table: str, points: Points) -> list[Row]:
    """A table's rows from times without a spread."""
    return [dict(zip(KEYS[table], key, strict=True)) | {"time_us": us, "spread": 0.0} for key, us in points.items()]


_KINDS: dict[str, Any] = dict.fromkeys(("op", "term", "kind", "direction"), str) | {
    **{"imbalance": float, "chunks": list[list[int]], "decodes": list[int]},
    **{"time_us": float, "slowed_us": float, "spread": float},
}
"""Columns that hold something else than whole numbers -> what they hold."""
MOST_US = 1e12  # of a step, which are eleven days


def _check_table(table: str, keys: Sequence[str], rows: Sequence[Row]) -> None:
    if not rows:
        raise TandemError(f"profile table {table} is missing or empty; {MEASURE}")
    for number, row in enumerate(rows):
        absent = [column for column in (*keys, "time_us", "spread") if column not in row]
        if absent:
            raise TandemError(
                f"profile table {table}: no column {absent[0]}, only {', '.join(row)}; times are microseconds"
            )
        for column in ("time_us", "slowed_us") if table == IN_SERVICE else ("time_us",):
            value = row.get(column)
            if not isinstance(value, int | float) or not 0 <= value <= MOST_US:
                raise TandemError(
                    f"profile table {table}, row {number}: {column} is {value}; times are microseconds >= 0: "
                    f"{CALIBRATE if column == 'slowed_us' else MEASURE}"
                )
        for column in keys:
            value = row[column]
            if not is_a(value, _KINDS.get(column, int)) or (isinstance(value, int | float) and not 0 <= value < 2**40):
                raise TandemError(f"profile table {table}, row {number}: {column} is {value!r:.60}; {MEASURE}")


def _check_points(profile: Profile) -> None:
    """Refuse a table that has two times of one point, and captured steps of one kind alone."""
    kinds = {row["kind"] for row in profile.tables.get("graph", ())}
    if kinds and not kinds >= {"decode", "mixed"}:
        raise TandemError(f"profile table graph: it has steps of {', '.join(kinds)} alone; {MEASURE}")
    for table, rows in profile.tables.items():
        points = Counter(tuple(str(row[key]) for key in KEYS[table]) for row in rows if table != "held_out")
        if twice := [point for point, count in points.items() if count > 1]:
            raise TandemError(f"profile table {table}: two rows of {', '.join(twice[0])}; {MEASURE}")


def _check_units(folder: Path, profile: Profile) -> None:
    """Refuse times that are too short for any machine, as milliseconds and seconds are when taken for microseconds."""
    head = min(profile.tables["head"], key=lambda row: row["samples"])
    weights = 2 * profile.model.vocab_size * profile.model.hidden_size  # bytes, at least
    if 0 < head["time_us"] * FASTEST_BYTES_PER_US < weights:  # 0: left out
        raise TandemError(
            f"{folder}/head.parquet: in {head['time_us']:.3g} µs, for {head['samples']} samples, no machine reads the "
            f"{weights / 1e6:,.0f} MB of the head: are these times in another unit than microseconds?"
        )


def shipped_profiles() -> dict[str, Path]:
    """The folders of the profiles that ship, by name: `hardware/model`."""
    folders = sorted(path.parent for path in SHIPPED.glob("*/*/meta.yaml"))
    return {folder.relative_to(SHIPPED).as_posix(): folder for folder in folders}


def find_profile(where: Path) -> Path:
    """A profile's folder as it is, or, where there is none, the one that ships under that name.

    Raises:
        TandemError: neither is there.
    """
    shipped = shipped_profiles()
    if not where.exists() and where.as_posix() not in shipped:
        known = ", ".join(shipped)
        raise TandemError(f"{where} is not a profile: there is no such folder, and the profiles that ship are {known}")
    return where if where.exists() else shipped[where.as_posix()]


def read_profile(folder: Path) -> Profile:
    """Read a profile's folder; `find_profile` says which one is meant by a name.

    Raises:
        TandemError: a file is missing, damaged, or of another schema version, or times are no microseconds.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    meta = read_meta(folder / "meta.yaml")
    tables = {}
    for table in KEYS:
        path = _table_file(folder, table)
        if table in OPTIONAL_TABLES and not path.exists():
            continue
        try:
            # `read_table` would import what reads many files, in 50 ms or more.
            with pq.ParquetFile(check_no_pipe(path)) as file:
                read = file.read()
            tables[table] = read.rename_columns([_today(name) for name in read.column_names]).to_pylist()
        except (OSError, pa.ArrowException, OverflowError, UnicodeDecodeError) as error:
            raise TandemError(f"{path}: cannot be read ({first_line(error)})") from error
    with errors_at(folder):
        profile = Profile(meta, tables)
        _check_points(profile)
    _check_units(folder, profile)
    return profile


def _today(name: str) -> str:
    return BEFORE_3.get(name, name)


def _table_file(folder: Path, table: str) -> Path:
    """The file of a table; under the name that it had before, if it is there under that alone."""
    paths = [folder / f"{name}.parquet" for name in (table, *(old for old, new in BEFORE_3.items() if new == table))]
    return next((path for path in paths if path.exists()), paths[0])


def read_meta(path: Path) -> ProfileMeta:
    """Read a profile's meta.yaml. Raises TandemError if it is missing, damaged, or of another schema version."""
    if not path.exists():
        raise TandemError(f"{path.parent} is not a profile: it has no meta.yaml")
    entries = read_yaml(path)
    version = entries.pop("schema", None) if isinstance(entries, dict) else None
    if version not in (2, SCHEMA_VERSION):
        raise TandemError(f"{path}: not profile schema {SCHEMA_VERSION}; {MEASURE}")
    renamed = {_today(name) if version == 2 else name: value for name, value in entries.items()}
    try:
        return ProfileMeta.from_dict(renamed)
    except TandemError as error:
        raise TandemError(f"{path}: {error}") from error


def read_yaml(path: Path) -> Any:
    """The contents of a YAML file. Raises TandemError if it cannot be read."""
    try:
        return yaml.safe_load(check_no_pipe(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise TandemError(f"{path}: cannot be read ({first_line(error)})") from error


def check_profile_out(folder: Path, overwrite: bool = False) -> None:
    """Raises TandemError if a profile may not be written to `folder`, as something is there to stay; or cannot."""
    is_profile = (folder / "meta.yaml").exists()
    if is_profile and not overwrite:
        raise TandemError(f"{folder} holds a profile: choose another --out, or add --overwrite to replace it")
    if folder.exists() and not is_profile and (not folder.is_dir() or any(folder.iterdir())):
        raise TandemError(f"{folder} is not empty and not a profile: choose another --out")
    check_writable(folder)


def write_profile(profile: Profile, folder: Path, overwrite: bool = False) -> None:
    """Write a profile, or nothing; with `overwrite`, one that is there is replaced once the new one is whole.

    Raises:
        TandemError: the folder holds a profile or something else, or cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_profile_out(folder, overwrite)
    draft = draft_of(folder)
    try:
        draft.mkdir(parents=True)
        for table, rows in profile.tables.items():
            pq.write_table(pa.Table.from_pylist(rows), draft / f"{table}.parquet", compression="zstd")
        meta = {"schema": SCHEMA_VERSION} | profile.meta.to_dict()
        text = yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)
        (draft / "meta.yaml").write_text(text, encoding="utf-8")
        publish(draft, folder, overwrite)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise TandemError(f"cannot write profile {folder}: {error.strerror or error}") from error
