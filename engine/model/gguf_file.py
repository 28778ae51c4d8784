"""A GGUF file's header: its metadata, and where its tensors are. Reads nothing that lies beyond the file's end.

The `gguf` package has a reader too. It makes an object of every element of every array, tokens among them, and takes as
many as the file claims to have. The layout is that of ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.model.files import check_file, first_line, shown
from traces.errors import TandemError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's codes
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4


class Skipped(NamedTuple):
    """An array of the metadata, whose elements are not kept."""

    elements: int


class GgufTensor(NamedTuple):
    """A tensor's place in the file.

    Attributes:
        shape: rows first, as elsewhere than in GGUF.
        kind: a number of `gguf.GGMLQuantizationType`.
        start: its first byte, counted from the end of the header.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file that is open.

    Attributes:
        path: where it is.
        fields: its metadata by key.
        tensors: by name.
        data: the bytes behind the header.
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: Bytes

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read the header.

        Raises:
            TandemError: it is no GGUF file, is damaged or cut off, or is a part of a model.
        """
        check_file(path)
        try:
            file = _read(path, np.memmap(path, np.uint8, "r"))
            for tensor in file.tensors.values():
                file.bytes_of(tensor)
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise TandemError(
                f"{path}: corrupt or cut off GGUF file ({first_line(error)}); download it again"
            ) from None
        if file.fields.get("split.count", 1) not in (0, 1):
            raise TandemError(f"{path}: is a part of a model; join the parts with llama-gguf-split --merge")
        return file

    def bytes_of(self, tensor: GgufTensor) -> Bytes:
        """A tensor's rows of bytes, as `gguf.dequantize` takes them.

        Raises:
            ValueError: they lie beyond the file's end, or the type is unknown.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # takes longer to import than a config to read

        elements, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
        *rows, columns = tensor.shape
        if columns % elements:
            raise ValueError(f"a row of {columns} elements is not made of blocks of {elements}")
        row_bytes = columns // elements * size
        count = math.prod(rows) * row_bytes
        if tensor.start + count > len(self.data):
            raise ValueError("a tensor ends beyond the file")
        return self.data[tensor.start :][:count].reshape(*rows, row_bytes)


@dataclass(slots=True)
class _Cursor:
    """A place in the header, which moves as it is read."""

    data: memoryview
    at: int = 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise ValueError("its header ends beyond the file")
        self.at += count

    def text(self) -> str:
        length, start = self.number("Q"), self.at
        self.skip(length)
        return bytes(self.data[start : self.at]).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        return self.array() if kind == ARRAY else self.number(_code(kind))

    def array(self) -> Skipped:
        kind, count = self.number("I"), self.number("Q")
        if kind != STRING:
            self.skip(count * struct.calcsize(_code(kind)))
            return Skipped(count)
        if count * 8 > len(self.data) - self.at:
            raise ValueError("its header ends beyond the file")
        for _ in range(count):
            self.skip(self.number("Q"))
        return Skipped(count)

    def tensor(self) -> GgufTensor:
        dimensions = self.number("I")
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape = [self.number("Q") for _ in range(dimensions)]
        return GgufTensor(tuple(reversed(shape)), self.number("I"), self.number("Q"))


def _code(kind: int) -> str:
    if kind not in NUMBERS:
        raise ValueError(f"a value of unknown type {kind}")
    return NUMBERS[kind]


def _read(path: Path, data: Bytes) -> GgufFile:
    cursor = _Cursor(data.data)
    if bytes(data[:4]) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    cursor.skip(4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, where 2 and 3 are known")
    tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = _new(cursor.text(), fields)
        fields[key] = cursor.value(cursor.number("I"))
    tensors: dict[str, GgufTensor] = {}
    for _ in range(tensor_count):
        name = _new(cursor.text(), tensors)
        tensors[name] = cursor.tensor()
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment is {alignment}")
    return GgufFile(path, fields, tensors, data[-(-cursor.at // alignment) * alignment :])


def _new(name: str, known: dict[str, Any]) -> str:
    if name in known:
        raise ValueError(f"it has {shown(name)} twice")
    return name
