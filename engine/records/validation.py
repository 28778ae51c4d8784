"""What is read of runs and profiles, against its schema: whatever is not as Tandem writes it is one line of error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from traces.errors import TandemError

if TYPE_CHECKING:
    import pyarrow as pa

Checked = TypeVar("Checked")

MOST_NS = 2**62
_MOST = 1e18
MOST_TOKENS = 2**40


@dataclass(frozen=True, slots=True)
class Column:
    """What a column of an Arrow table may hold.

    Attributes:
        type: the Arrow type's name; of lists that of their values, and `[]`.
        nullable: whether it may have nulls.
        least, most: the range of numbers.
        words: all that strings may be; empty: any.
    """

    type: str
    nullable: bool = False
    least: int = 0
    most: int = MOST_TOKENS
    words: tuple[str, ...] = ()


def check_table(table: pa.Table, columns: Mapping[str, Column], key: Sequence[str] = ()) -> None:
    """Check a table whose columns have the right names.

    Args:
        table: the table.
        columns: what they may hold.
        key: columns in which no two rows are equal.

    Raises:
        TandemError: a column is of another type, has a null or a number out of range, or a row is there twice.
    """
    for name, column in columns.items():
        _check_column(name, table[name], column)
    if key and table.select(key).group_by(list(key)).aggregate([]).num_rows < table.num_rows:
        raise TandemError(f"two rows have the same {', '.join(key)}")


def _check_column(name: str, values: pa.ChunkedArray, column: Column) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = f"{values.type.value_type}[]" if pa.types.is_list(values.type) else str(values.type)
    if kind != column.type:
        raise TandemError(f"column {name} is of type {kind}, not {column.type}")
    if values.null_count and not column.nullable:
        raise TandemError(f"column {name} has {values.null_count} nulls")
    if column.type == "int64":
        extremes = pc.min_max(values).as_py()
        least, most = extremes["min"], extremes["max"]
        if least is not None and not column.least <= least <= most <= column.most:
            wrong = least if least < column.least else most
            raise TandemError(f"column {name} has the value {wrong}: it must be from {column.least} to {column.most}")
    if column.words and (strange := set(pc.unique(values).to_pylist()) - {*column.words}):
        raise TandemError(f"column {name} has {min(strange)!r:.60}, none of {', '.join(column.words)}")


class Section(dict[str, Any]):
    """A part of a JSON file. A field that is asked for and not there is an error of the file, not of the program."""

    def __init__(self, place: str, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.place = place

    def __missing__(self, name: str) -> Any:
        file, _, part = self.place.partition(": ")
        where = f" in {part}" if part else ""
        raise TandemError(f"{file}: no '{name}'{where}; it was written by another version")


def check_fields(place: str, fields: Any, types: Mapping[str, Any]) -> Section:
    """The fields of a JSON object. Those that are absent are said to be so once somebody asks for them.

    Args:
        place: the file, and after a colon the part of it.
        fields: what was read.
        types: the types of those that are known.

    Raises:
        TandemError: it is no object, or a field is of another type.
    """
    if not isinstance(fields, dict):
        raise TandemError(f"{place} is {_shown(fields)}: it must be a JSON object")
    for name, kind in types.items():
        if name in fields and not is_a(fields[name], kind):
            raise TandemError(f"{place}: {name} is {_shown(fields[name])}, which is no {_word(kind)}")
    return Section(place, fields)


def check_types(value: Any) -> None:
    """Check a dataclass's fields, and those of dataclasses in it, against their annotations.

    Raises:
        TandemError: one is of another type, or a number that is not finite.
    """
    for name, kind in get_type_hints(type(value)).items():
        if not is_a(getattr(value, name), kind):
            raise TandemError(f"{name} is {_shown(getattr(value, name))}, which is no {_word(kind)}")


def checked(value: Checked) -> Checked:
    """The value, once `check_types` has found nothing."""
    check_types(value)
    return value


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value that was read is of a type. Whole numbers are floats too; no number is infinite or near it."""
    parts = get_args(kind)
    match get_origin(kind) or kind:
        case _ if kind is Any:
            found = True
        case origin if origin in (Union, UnionType):
            found = any(is_a(value, part) for part in parts)
        case origin if origin is Literal:
            found = value in parts
        case origin if origin in (tuple, list) and parts:
            found = isinstance(value, tuple | list) and all(is_a(each, parts[0]) for each in value)
        case origin if origin is dict and parts:
            found = isinstance(value, dict) and all(is_a(k, parts[0]) and is_a(v, parts[1]) for k, v in value.items())
        case origin if origin is float:
            found = type(value) in (int, float) and abs(value) < _MOST and math.isfinite(value)
        case origin if origin is int:
            found = type(value) is int and abs(value) < MOST_NS
        case origin:
            found = isinstance(value, origin)
    return found


def _shown(value: object) -> str:
    return f"{value!r:.60}"


def _word(kind: Any) -> str:
    words = {int: "whole number", float: "number", str: "text", bool: "yes or no", NoneType: "null"}
    parts = [part for part in get_args(kind) if part is not NoneType] if get_origin(kind) in (Union, UnionType) else []
    if parts:
        return " or ".join(map(_word, parts))
    return words.get(kind, {tuple: "list", list: "list", dict: "object"}.get(get_origin(kind) or kind, "valid entry"))
