"""Rows of integers by the million: in memory while they are few, and else in a temporary file."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
import numpy.typing as npt

from traces.errors import TandemError, reason

Rows = npt.NDArray[np.int64]

IN_MEMORY = 2**19  # rows, at most: 16 MB of four numbers each
BLOCK = 2**14  # rows


class SpilledRows:
    """Rows of `width` int64 that can be added to and not changed. Any part can be read."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._last = array("q")  # the rows that are in no file
        self._file: IO[bytes] | None = None
        self._in_file = 0  # rows

    def append(self, row: Sequence[int]) -> None:
        """Add a row. Raises TandemError if the disk is full."""
        self._last.extend(row)
        if len(self._last) >= IN_MEMORY * self._width:
            self._spill()

    def extend(self, rows: Rows) -> None:
        """Add (n, width) rows. Raises TandemError if the disk is full."""
        self._last.frombytes(np.ascontiguousarray(rows, np.int64).tobytes())
        if len(self._last) >= IN_MEMORY * self._width:
            self._spill()

    def _spill(self) -> None:
        try:
            self._file = self._file or tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - as long as the rows
            left = memoryview(self._last).cast("B")
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise TandemError(
                f"{len(self)} requests do not fit into {tempfile.gettempdir()} ({reason(error)}): "
                "set TMPDIR to a folder with more room"
            ) from error
        self._in_file = len(self)
        self._last = array("q")

    def __len__(self) -> int:
        return self._in_file + len(self._last) // self._width

    def read(self, start: int, stop: int) -> Rows:
        """(stop - start, width): rows from `start` on, before `stop`."""
        first = max(start - self._in_file, 0) * self._width
        rows = np.array(self._last[first : max(stop - self._in_file, 0) * self._width], np.int64)
        if self._file and start < self._in_file:
            size = 8 * self._width
            wanted = (min(stop, self._in_file) - start) * size
            filed = np.frombuffer(os.pread(self._file.fileno(), wanted, start * size), np.int64)
            rows = np.concatenate((filed, rows)) if rows.size else filed
        return rows.reshape(-1, self._width)

    def blocks(self, size: int = BLOCK) -> Iterator[Rows]:
        """All rows, at most `size` at a time."""
        for start in range(0, len(self), size):
            yield self.read(start, min(start + size, len(self)))
