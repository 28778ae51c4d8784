"""The parts that benchmarks share: one document, and tables made from it.

A benchmark yields rows while it measures, so that whatever ends it early leaves the rows so far. Times of the engine
come from the records of its runs, never from a stopwatch beside them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from analysis.jobs.limits import Settled
from analysis.jobs.progress import Progress
from analysis.jobs.run import of_executor
from analysis.metrics.columns import column
from analysis.report.tables import TextTable
from engine.config import ServingConfig
from engine.records import manifest
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from traces.synthetic import synthetic

if TYPE_CHECKING:
    import pyarrow as pa

    from engine.executor.executor import Executor

SCHEMA_VERSION = 1
TANDEM = (sys.executable, "-c", "from analysis.cli.main import main; main()")  # as a process of its own
WARM_UP = (8, 16, 4)  # requests, prompt tokens, output tokens

Row = dict[str, Any]
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark that can begin.

    Attributes:
        name: of the benchmark.
        how: says how its figures are measured.
        facts: on what it runs: `system` and `provenance` as in a manifest, and more.
        rows: measures while it is iterated. It yields each row, by its `row`, and again whenever more of it is known.
        tables: makes tables of the rows.
    """

    name: str
    how: str
    facts: Mapping[str, Any]
    rows: Iterable[Row]
    tables: Callable[[Sequence[Row]], Iterable[TextTable]]


def run_benchmark(benchmark: Benchmark) -> tuple[Document, BaseException | None]:
    """Run a benchmark. Returns its document, and the error that ended it early (Ctrl-C, a failing data plane)."""
    rows: dict[str, Row] = {}
    failure: BaseException | None = None
    try:
        for row in benchmark.rows:
            rows[row["row"]] = row
    except BaseException as error:  # whatever it was, the rows so far are worth keeping
        failure = error
    head = {"schema": SCHEMA_VERSION, "benchmark": benchmark.name, "partial": failure is not None, "how": benchmark.how}
    return head | dict(benchmark.facts) | {"rows": [*rows.values()]}, failure


def document_tables(benchmark: Benchmark, document: Document) -> Iterator[TextTable]:
    """The document for people: first on what it ran."""
    system = document["system"]
    subject = [document.get("profile", system["device"]), system.get("scheduler"), "partial" * document["partial"]]
    words = filter(None, (document.get("model"), document.get("dtype"), *subject))
    yield TextTable(", ".join(words), "", (), ())
    yield from benchmark.tables(document["rows"])


# -- benchmarks of the executor --------------------------------------------------------------------------------


def warmed_up(executor: Executor, settled: Settled, progress: Progress) -> dict[str, Any]:
    """Say the limits, and serve a small batch: kernels are compiled and graphs captured once, and in no figure.

    Returns:
        `Benchmark.facts`.

    Raises:
        TandemError: the limits cannot be served with.
    """
    settled.say(progress)
    config, (requests, prompt, output) = settled.config, WARM_UP
    half = max(1, config.max_model_len // 2)
    with progress.status("warming up"):
        serve_batch(executor, BenchBatch(min(requests, config.max_seqs), min(prompt, half)), min(output, half), config)
    parts = manifest.compose(config=config, **of_executor(executor))
    return {"model": executor.model.name, "dtype": executor.dtype} | parts


class BenchBatch(NamedTuple):
    """Equal requests, handed in at once."""

    size: int
    input_len: int

    def __str__(self) -> str:
        return f"{self.size}x{self.input_len}"


def read_batch(text: str) -> BenchBatch:
    """Read BATCHxINPUT. Raises ValueError if it is not two numbers of 1 or more."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text, re.ASCII)
    if not found:
        raise ValueError(text)
    return BenchBatch(int(found[1]), int(found[2]))


def serve_batch(executor: Executor, batch: BenchBatch, outputs: int, config: ServingConfig) -> RunRecords:
    """The records of a batch that is handed in at once, of whose requests each makes `outputs` tokens."""
    trace = synthetic(batch.size, 0, f"fixed:{batch.input_len}", f"fixed:{outputs}")
    recorder = Recorder()
    executor.serve(trace.requests, config, recorder)
    return RunRecords({}, recorder.tables())


def decode_steps(tables: Sequence[pa.Table], batch: int, slack: int = 0) -> dict[str, int | float | None]:
    """Times of the steps that only decode, `batch` sequences give or take `slack`, over several runs.

    Args:
        tables: `steps` of each run.

    Returns:
        `steps`: how many; and the p50 and p99 in microseconds of `host` (from the clock read to the launched step:
        schedule, prepare, launch) and `device` (the data plane's work on it), None where there are no such steps.
    """
    found: dict[str, list[Any]] = {"host": [], "device": []}
    for steps in tables:
        decodes = column(steps, "decode_tokens")
        chosen = (column(steps, "chunks") == 0) & (np.abs(decodes - batch) <= slack)
        found["host"] += (column(steps, "launched_ns") - column(steps, "scheduled_ns"))[chosen].tolist()
        found["device"] += column(steps, "device_ns")[chosen].tolist()
    return {"steps": len(found["host"])} | {
        f"p{percent}_{name}_us": float(np.percentile(ns, percent)) / 1e3 if ns else None
        for name, ns in found.items()
        for percent in (50, 99)
    }
