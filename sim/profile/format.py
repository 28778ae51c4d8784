"""Latency profiles: the format, reading and writing, and interpolation.

A profile is one hardware x model shape x dtype: a folder of Parquet tables of measured times, and a `meta.yaml`
that says what was measured, where, how, and how well the tables predict points that were held out of them.
All times are microseconds for one step of the whole model (all layers).
"""

from __future__ import annotations

import math
import os
import shutil
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from engine.model.config import ModelConfig
from traces.errors import TandemError

SCHEMA_VERSION = 2
FASTEST_BYTES_PER_US = 50e6  # 50 TB/s: memory that is several times faster than any there is
SHIPPED = Path(__file__).parents[1] / "profiles"  # hardware/model

# table -> key columns; every table also has `time_us` and `spread` (interquartile range / median of the repeats)
TABLES: dict[str, tuple[str, ...]] = {
    "dense": ("op", "tokens"),  # everything whose cost depends on the number of tokens in the step alone
    "prefill_attention": ("chunk", "context"),  # one request's chunk over `context` earlier tokens
    # All decodes of a step; kv_tokens is their sum, unevenness the mean square of their contexts over the squared mean.
    "decode_attention": ("sequences", "kv_tokens", "unevenness"),
    "head": ("samples",),  # final norm, language-model head and sampling
    # By kind of step: decode, prefill (mixed too), or any. The sequences of a prefill are those with a chunk in it: the
    # others cost the host little.
    "host": ("term", "kind", "sequences"),
}
OPTIONAL_TABLES: dict[str, tuple[str, ...]] = {
    "graph": ("kind", "rows"),  # a whole captured step (`decode`, `mixed`) of so many rows that attends to nothing
    # The same while serving: at no load, and in a further column `slowed_us` what full load adds.
    "served": ("kind", "rows"),
    "swap": ("direction", "blocks"),  # copies of KV blocks between the tiers, `out` to host memory and back `in`
    # What decodes add to the attention of a step that prefills too, for kernels that attend to both in one launch.
    "mixed_decode_attention": ("sequences", "kv_tokens"),
}
KEYS = TABLES | OPTIONAL_TABLES
# now -> plan made -> launched; device end -> noticed; noticed -> next clock read; event due -> clock read
HOST_TERMS = ("plan", "launch", "notice", "turn", "wake")
HOST_TERMS_BY_KIND = ("plan", "launch")  # the others do not depend on what a step runs

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile in memory: `meta` as in meta.yaml, and rows by table."""

    meta: dict[str, Any]
    tables: dict[str, list[Row]]

    def __post_init__(self) -> None:
        for table, keys in TABLES.items():
            _check_table(table, keys, self.tables.get(table, []))
        for table, keys in OPTIONAL_TABLES.items():
            if table in self.tables:
                _check_table(table, keys, self.tables[table])
        _check_served(self.tables.get("served"), self.meta.get("load"))
        missing = set(HOST_TERMS) - {row["term"] for row in self.tables["host"]}
        if missing:
            raise TandemError(f"profile table host: no {', '.join(sorted(missing))}; measure the profile again")

    @property
    def name(self) -> str:
        """What was measured, for people."""
        return f"{self.meta['model']['name']} {self.meta['dtype']} on {self.meta['device']}"

    @property
    def model(self) -> ModelConfig:
        """The shape that was measured."""
        return ModelConfig.from_dict(self.meta["model"])

    def host(self, term: str, kind: str) -> Curve:
        """The host's time (µs) for one of `HOST_TERMS` by sequences; `kind` is decode or prefill."""
        rows = [row for row in self.tables["host"] if row["term"] == term]
        own = [row for row in rows if row["kind"] == kind] or [row for row in rows if row["kind"] == "any"]
        return Curve({row["sequences"]: row["time_us"] for row in own or rows})


def _check_table(table: str, keys: Sequence[str], rows: Sequence[Row]) -> None:
    if not rows:
        raise TandemError(f"profile table {table} is missing or empty; measure the profile again")
    for number, row in enumerate(rows):
        absent = [column for column in (*keys, "time_us", "spread") if column not in row]
        if absent:
            raise TandemError(
                f"profile table {table}: no column {absent[0]}, only {', '.join(row)}; times are microseconds"
            )
        time_us = row["time_us"]
        if not isinstance(time_us, int | float) or not math.isfinite(time_us) or time_us < 0:
            raise TandemError(f"profile table {table}, row {number}: time_us is {time_us}; times are microseconds >= 0")


def _check_served(rows: Sequence[Row] | None, load: Mapping[str, float] | None) -> None:
    again = "calibrate the profile again (tandem profile calibrate)"
    if (rows is None) != (load is None) or (load and load.keys() != {"memory_us", "row_us", "limit"}):
        raise TandemError(f"profile table served and the entry load (memory_us, row_us, limit) go together: {again}")
    for number, row in enumerate(rows or ()):
        slowed_us = row.get("slowed_us")
        if not isinstance(slowed_us, int | float) or not math.isfinite(slowed_us) or slowed_us < 0:
            raise TandemError(
                f"profile table served, row {number}: slowed_us is {slowed_us}, not microseconds >= 0: {again}"
            )


def _check_units(folder: Path, profile: Profile) -> None:
    """Refuse times that are too short for any machine, as milliseconds and seconds are when taken for microseconds."""
    head = min(profile.tables["head"], key=lambda row: row["samples"])
    model = profile.meta["model"]
    weights = 2 * model.get("vocab_size", 0) * model.get("hidden_size", 0)  # bytes, at least
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
    if where.exists():
        return where
    if where.as_posix() not in shipped:
        known = ", ".join(shipped)
        raise TandemError(f"{where} is not a profile: there is no such folder, and the profiles that ship are {known}")
    return shipped[where.as_posix()]


def read_profile(folder: Path) -> Profile:
    """Read a profile's folder; `find_profile` says which one is meant by a name.

    Raises:
        TandemError: a file is missing, damaged, or of another schema version, or times are no microseconds.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    meta = read_meta(folder / "meta.yaml")
    tables = {}
    for table in (*TABLES, *OPTIONAL_TABLES):
        path = folder / f"{table}.parquet"
        if table in OPTIONAL_TABLES and not path.exists():
            continue
        try:
            with pq.ParquetFile(path) as file:  # `read_table` would import what reads many files, in 50 ms or more
                tables[table] = file.read().to_pylist()
        except (OSError, pa.ArrowInvalid) as error:
            raise TandemError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    profile = Profile(meta, tables)
    _check_units(folder, profile)
    return profile


def read_meta(path: Path) -> dict[str, Any]:
    """Read a profile's meta.yaml. Raises TandemError if it is missing, damaged, or of another schema version."""
    try:
        meta = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise TandemError(f"{path.parent} is not a profile: it has no meta.yaml") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TandemError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(meta, dict) or meta.get("schema") != SCHEMA_VERSION:
        raise TandemError(f"{path}: not profile schema {SCHEMA_VERSION}; measure the profile again")
    missing = [key for key in ("device", "model", "dtype", "source") if key not in meta]
    if missing:
        raise TandemError(f"{path}: no entry '{missing[0]}'")
    return meta


def check_profile_out(folder: Path, overwrite: bool = False) -> None:
    """Raises TandemError if a profile may not be written to `folder`: something is there that is to stay."""
    is_profile = (folder / "meta.yaml").exists()
    if is_profile and not overwrite:
        raise TandemError(f"{folder} holds a profile: choose another --out, or add --overwrite to replace it")
    if folder.exists() and not is_profile and (not folder.is_dir() or any(folder.iterdir())):
        raise TandemError(f"{folder} is not empty and not a profile: choose another --out")


def write_profile(profile: Profile, folder: Path, overwrite: bool = False) -> None:
    """Write a profile, or nothing; with `overwrite`, one that is there is replaced once the new one is whole.

    Raises:
        TandemError: the folder holds a profile or something else, or cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_profile_out(folder, overwrite)
    draft = folder.with_name(folder.name + ".tmp")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for table, rows in profile.tables.items():
            pq.write_table(pa.Table.from_pylist(rows), draft / f"{table}.parquet", compression="zstd")
        meta = {"schema": SCHEMA_VERSION} | profile.meta
        (draft / "meta.yaml").write_text(yaml.safe_dump(meta, sort_keys=False, allow_unicode=True))
        if overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise TandemError(f"cannot write profile {folder}: {error.strerror or error}") from error


class Curve:
    """Piecewise-linear time over one axis. Beyond its ends it goes on along its last (first) piece."""

    __slots__ = ("_bends", "_pieces", "xs")

    def __init__(self, points: Mapping[float, float]) -> None:
        self.xs = sorted(points)
        corners = [(x, points[x]) for x in self.xs]
        self._bends = self.xs[1:-1]  # where one piece ends and the next begins
        self._pieces = [(x0, y0, y1 - y0, x1 - x0) for (x0, y0), (x1, y1) in pairwise(corners)] or [(*corners[0], 0, 1)]

    def __call__(self, x: float) -> float:
        """Time at `x`, at least 0."""
        x0, y0, rise, run = self._pieces[bisect_right(self._bends, x)]
        time = y0 + (x - x0) * rise / run
        return time if time > 0.0 else 0.0

    def covers(self, x: float) -> bool:
        """Whether `x` lies in the measured range."""
        return self.xs[0] <= x <= self.xs[-1]


class Surface:
    """Piecewise-linear time over two axes: a curve over the second axis at each measured value of the first."""

    __slots__ = ("_curves", "_measured", "xs")

    def __init__(self, points: Mapping[tuple[float, float], float]) -> None:
        rows: dict[float, dict[float, float]] = {}
        for (x, y), time in points.items():
            rows.setdefault(x, {})[y] = time
        self.xs = sorted(rows)
        self._curves = [Curve(rows[x]) for x in self.xs]
        ranges = [(curve.xs[0], curve.xs[-1]) for curve in self._curves]
        self._measured = [sorted(set(beside)) for beside in pairwise(ranges)] or [ranges]  # from each x to the next

    def __call__(self, x: float, y: float) -> float:
        """Time at (x, y), at least 0."""
        left, right, weight = self._beside(x)
        low = left(y)
        return max(0.0, low + weight * (right(y) - low))

    def at(self, x: float) -> Curve:
        """Time over the second axis at `x`: what calls with this `x` return."""
        left, right, weight = self._beside(x)
        points = {}
        for y in {*left.xs, *right.xs}:
            low = left(y)
            points[y] = low + weight * (right(y) - low)
        return Curve(points)

    def _beside(self, x: float) -> tuple[Curve, Curve, float]:
        """The measured curves on both sides of `x` (or at the end it lies beyond), and how far it is from the first."""
        xs, curves = self.xs, self._curves
        if len(xs) == 1:
            return curves[0], curves[0], 0.0
        right = bisect_right(xs, x, 1, len(xs) - 1)
        return curves[right - 1], curves[right], (x - xs[right - 1]) / (xs[right] - xs[right - 1])

    def covers(self, x: float, y: float) -> bool:
        """Whether (x, y) lies in the measured range."""
        return any(low <= y <= high for low, high in self.measured(x))

    def measured(self, x: float) -> list[tuple[float, float]]:
        """The ranges of the second axis that were measured beside `x`: a point in any of them is covered."""
        if not self.xs[0] <= x <= self.xs[-1]:
            return []
        return self._measured[bisect_right(self.xs, x, 1, len(self._measured)) - 1]
