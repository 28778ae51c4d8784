"""What a source of measurements is to the importers: where it was published, what it holds, and how files are read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.model.config import ModelConfig
from engine.model.files import first_line
from sim.profile.format import Points, Row
from traces.errors import TandemError, check_no_pipe

Line = dict[int, float]  # time by tokens, samples or sequences
Operations = Mapping[str, tuple[str, int, int]]  # theirs -> ours, and how often it runs: in each layer, and once a step


@dataclass(slots=True)
class Measured:
    """What one source has of a model.

    Attributes:
        path: the file or folder that was read.
        about: provenance: source, commit, licence, file_sha256, engine, dtype, device (None: not stated), model.
        tables: points by table; a table that the source has not is absent.
        rules: by table, what of it was not measured and how it was filled in.
        lacks: of `small` (norms, rotary embedding, activation) and `sampling`, what the tables do not hold.
        imbalance: by sequences, the share of time that decode attention gains as context imbalance goes from 1 to 2.
        checks: held-out errors that the reader found itself, by name.
    """

    path: Path
    about: dict[str, Any]
    tables: dict[str, Points]
    rules: dict[str, str] = field(default_factory=dict)
    lacks: frozenset[str] = frozenset()
    imbalance: dict[float, float] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)


def provenance(path: Path, repository: str, commit: str, licence: str, *digests: str) -> dict[str, Any]:
    """Of a file that a repository published, at `commit` if its SHA-256 is among `digests`, else at an unknown one."""
    digest = hashlib.sha256(check_no_pipe(path).read_bytes()).hexdigest()
    known = commit if digest in digests else "unknown"
    return {"source": repository, "commit": known, "licence": licence, "file_sha256": digest}


def read_rows(path: Path, counts: Sequence[str], times: Sequence[str], texts: Sequence[str] = ()) -> list[Row]:
    """Rows of a .csv or .parquet file: whole numbers in `counts`, times in any unit in `times`, words in `texts`.

    Raises:
        TandemError: the file cannot be read, has no rows, lacks a column, or holds what is no count or no time.
    """
    import pyarrow as pa
    import pyarrow.csv as pc
    import pyarrow.parquet as pq

    check_no_pipe(path)
    try:
        table = pc.read_csv(path) if path.suffix == ".csv" else pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise TandemError(f"{path}: cannot be read ({first_line(error)})") from error
    wanted = [*counts, *times, *texts]
    missing = [column for column in wanted if column not in table.column_names]
    if missing:
        raise TandemError(f"{path}: no column '{missing[0]}': it is of another format, or of another version of it")
    rows: list[Row] = table.select(wanted).to_pylist()
    if not rows:
        raise TandemError(f"{path}: has no rows")
    for number, row in enumerate(rows, start=1):
        _check_row(f"{path}, row {number}", row, counts, times)
    return rows


def _check_row(place: str, row: Row, counts: Sequence[str], times: Sequence[str]) -> None:
    for column in counts:
        if type(row[column]) is not int or row[column] < 0:
            raise TandemError(f"{place}: {column} is {row[column]!r}, not a whole number")
    for column in times:
        if type(row[column]) not in (int, float) or not 0 < row[column] < math.inf:
            raise TandemError(f"{place}: {column} is {row[column]!r}, not a time above 0")


def dense_points(path: Path, operations: Operations, times: Mapping[tuple[str, int], float], layers: int) -> Points:
    """Table `dense` from times (us) by their operation and tokens. Raises TandemError if one is missing."""
    points: Points = {}
    for theirs, (ours, in_layer, once) in operations.items():
        for tokens in {tokens for _, tokens in times}:
            if (theirs, tokens) not in times:
                raise TandemError(f"{path}: no {theirs} of {tokens} tokens")
            time_us = (in_layer * layers + once) * times[theirs, tokens]
            points[ours, tokens] = points.get((ours, tokens), 0.0) + time_us
    return points


def check_shape(path: Path, found: Mapping[str, int], model: ModelConfig) -> None:
    """Raises TandemError unless `found`, by names of `ModelConfig`'s fields, is the shape of `model`."""
    wanted = asdict(model)
    for name, value in found.items():
        if wanted[name] != value:
            raise TandemError(f"{path}: measured with {name} {value}; {model.name} has {wanted[name]}")
