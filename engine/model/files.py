"""Files of models, read so that a broken one ends in one line: JSON objects, and a check that a path is a file."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from traces.errors import TandemError, reason

MOST_JSON = 2**24  # bytes; the largest index that is published has 9 MB, and objects take 20 times their text

MOST_SHOWN = 100  # characters of a name


def check_file(path: Path) -> None:
    """Raises TandemError if there is no such file, or it is a folder, a pipe or a device: opening those may block."""
    if not path.is_file():
        what = "is not a file" if path.exists() else "is missing"
        raise TandemError(f"{path}: {what}; download the model again")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises TandemError with the file, and with the line if there is one, if it is broken."""
    check_file(path)
    try:
        if path.stat().st_size > MOST_JSON:
            raise TandemError(f"{path}: has more than {MOST_JSON:,} bytes; download the file again")
        contents = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise TandemError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); download the file again") from None
    except RecursionError:
        raise TandemError(f"{path}: not a config: its brackets are nested too deep; download the file again") from None
    except (OSError, ValueError) as error:  # of text that is not UTF-8, and of numbers with too many digits
        raise TandemError(f"{path}: cannot be read ({reason(error)}); download the file again") from None
    if not isinstance(contents, dict):
        raise TandemError(f"{path}: holds a JSON {type(contents).__name__}, not an object; download the file again")
    return contents


def shown(name: str) -> str:
    """A name out of a file, for an error: as it is if it can be printed and is short, else quoted and cut."""
    return name if name.isprintable() and len(name) < MOST_SHOWN else reprlib.repr(name)


def first_line(error: BaseException) -> str:
    """The first line of a library's error, for an error of ours."""
    return (str(error) or type(error).__name__).splitlines()[0]
