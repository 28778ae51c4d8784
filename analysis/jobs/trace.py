"""Make a trace of real text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.jobs.progress import Progress
from traces.sharegpt import sample_requests, sharegpt_path
from traces.trace import Trace


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
