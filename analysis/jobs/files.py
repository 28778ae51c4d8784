"""Files that jobs write: whether they may, and JSON; and real text that they read, as a trace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.jobs.options import Output
from analysis.jobs.progress import Progress
from traces.errors import TandemError
from traces.outputs import atomic_file, check_writable
from traces.sharegpt import sample_requests, sharegpt_path
from traces.trace import Trace, check_trace_out


def check_new(path: Path, overwrite: bool) -> None:
    """Raises TandemError if a file is there that is to stay, or none can be written."""
    if path.exists() and not overwrite:
        raise TandemError(f"{path} is there already: choose another --out, or add --overwrite to replace it")
    if path.is_dir():
        raise TandemError(f"cannot write {path}: it is a folder; choose another --out")
    check_writable(path)


def check_new_trace(path: Path, overwrite: bool) -> None:
    """Raises TandemError if a trace may not be written to `path`, or cannot."""
    check_new(path, overwrite)
    check_trace_out(path)


def check_new_file(output: Output) -> None:
    """Raises TandemError if its file, if any, could not be written, or is there and is to stay."""
    if path := output.out:
        if path.is_dir() or not path.parent.is_dir():
            raise TandemError(f"cannot write {path}: give --out a file in a folder that exists")
        check_new(path, output.overwrite)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file, and its folder if there is none. Raises TandemError if that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TandemError(f"cannot write {path}: {error.strerror or error}; nothing was written") from error
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def sharegpt_trace(
    model: str, count: int, seed: int, progress: Progress, source: Path | None = None, **limits: Any
) -> Trace:
    """Sample real ShareGPT requests, counted with the model's tokenizer; all arrive at time 0.

    Args:
        source: the data set's file, if not the installed one.
        limits: as in `traces.sharegpt.sample_requests`.

    Raises:
        TandemError: no tokenizer at `model`, no data set, or too few requests within the limits.
    """
    from engine.executor.tokenizer import load_tokenizer, model_path

    path = model_path(model)
    with progress.status(f"reading the tokenizer of {path.name}"):
        encode = load_tokenizer(path).encode
    with progress.status("reading ShareGPT"):
        return sample_requests(source or sharegpt_path(), encode, count, seed, tokenizer_name=path.name, **limits)
