"""Files and folders that a command will write: whether it can, and how they appear whole."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from traces.errors import TandemError, reason

_TRIED = bytes(4096)


def check_writable(path: Path) -> None:
    """Try to write where `path` will be, before any work is done for it. Folders that are missing will be made.

    Raises:
        TandemError: that cannot be: a file is in a folder's place, permission is missing, the disk is full.
    """
    try:
        there = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(_TRIED)
    except OSError as error:
        raise TandemError(f"cannot write {path}: {reason(error)}; choose another --out") from error


def draft_of(folder: Path) -> Path:
    """A name beside a folder that no other process writes to, on whatever machine."""
    return folder.with_name(f"{folder.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")


def publish(draft: Path, folder: Path, overwrite: bool) -> None:
    """Put a whole folder in its place.

    Args:
        draft: the folder.
        folder: where it is to be.
        overwrite: whether a folder there is replaced.

    Raises:
        OSError: something came to be there meanwhile, or the folder cannot be renamed.
    """
    old = draft_of(folder)
    if overwrite:
        with suppress(FileNotFoundError):
            folder.rename(old)
    try:
        draft.rename(folder)
    except OSError:
        with suppress(OSError):
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears at `path`, replacing what was there, only if the block ends without an exception.

    Raises:
        TandemError: in place of any OSError, of the block too.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise TandemError(f"cannot write {path}: {reason(error)}; nothing was written") from error
        raise
