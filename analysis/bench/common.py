"""Times the engine on this machine as other engines are timed: what its benchmarks share.

They are `analysis.bench.forward`, batches handed in at once, and `analysis.bench.online`, requests that arrive.
Everything comes from the records of real runs, none of it from a stopwatch beside them. A benchmark yields its rows
while it measures, so that whatever ends it early leaves what is known by then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from analysis.cli.options import check_new
from analysis.jobs.limits import Settled, config_to_check
from analysis.jobs.options import Limits
from analysis.jobs.progress import Progress
from analysis.metrics.columns import Floats, column
from engine.config import ServingConfig
from engine.records import manifest
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from engine.scheduler import load_scheduler
from traces.errors import TandemError
from traces.synthetic import synthetic
from traces.trace import atomic_file

if TYPE_CHECKING:
    import pyarrow as pa

    from engine.executor.executor import Executor

SCHEMA_VERSION = 1
WARM_UP = (8, 16, 4)  # requests, prompt tokens, output tokens
TABLE_WIDTH = 160  # a table is cut off at no less than this, so that a pipe gets all of it

Row = dict[str, Any]


class Batch(NamedTuple):
    """Equal requests, handed in at once."""

    size: int
    input_len: int

    def __str__(self) -> str:
        return f"{self.size}x{self.input_len}"

    def blocks(self, outputs: int, block_size: int) -> int:
        """KV blocks that it needs to make `outputs` tokens a request after the first."""
        return self.size * -(-(self.input_len + outputs) // block_size)


def read_batch(text: str) -> Batch:
    """Read BATCHxINPUT. Raises ValueError if it is not two numbers of 1 or more."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise ValueError(text)
    return Batch(int(found[1]), int(found[2]))


class Benchmark(Protocol):
    """What `run_benchmark` can run.

    Attributes:
        name: of the benchmark.
    """

    name: ClassVar[str]

    @property
    def how(self) -> str:
        """What its figures span, for whoever finds them in a file."""

    @property
    def limits(self) -> Limits:
        """Of its runs, before memory is looked at."""

    def check(self) -> None:
        """Raises TandemError for what would otherwise come to light after minutes."""

    def settled(self, executor: Executor) -> Settled:
        """The limits of all its runs."""

    def measure(self, executor: Executor, config: ServingConfig, progress: Progress) -> Iterator[Row]:
        """Yields each row, by its `row`, and again whenever more is known of it."""

    def tables(self, rows: Sequence[Row]) -> Iterator[Table | str]:
        """The rows for people."""


def run_benchmark(
    benchmark: Benchmark, executor: Executor, out: Path | None, as_json: bool, progress: Progress, **facts: Any
) -> None:
    """Run a benchmark and print what it finds, as tables or JSON, on standard output.

    Whatever ends it early (Ctrl-C, a failing data plane) is raised once the rows so far are printed, marked partial.

    Args:
        out: a file that gets the JSON too.
        progress: is told of it.
        facts: what else the JSON should say of the run.

    Raises:
        TandemError: the limits cannot be served with, or `out` cannot be written.
    """
    settled = benchmark.settled(executor)
    settled.say(progress)
    config = settled.config
    with progress.status("warming up"):
        warm_up(executor, config)
    rows: dict[str, Row] = {}
    failure: BaseException | None = None
    try:
        for row in benchmark.measure(executor, config, progress):
            rows[row["row"]] = row
    except BaseException as error:  # whatever it was, the rows so far are worth keeping
        failure = error
    document = _document(benchmark, executor, config, [*rows.values()], failure is not None, facts)
    _show(benchmark, document, as_json)
    if out:
        with atomic_file(out) as file:
            file.write(json.dumps(document, indent=2).encode() + b"\n")
    if failure:
        raise failure


def check_benchmark(benchmark: Benchmark, out: Path | None, overwrite: bool = False) -> None:
    """Raises TandemError now for what would otherwise come to light after minutes: a bad policy, limit or folder."""
    benchmark.check()
    load_scheduler(config_to_check(benchmark.limits))
    check_out_file(out, overwrite)


def check_out_file(out: Path | None, overwrite: bool) -> None:
    """Raises TandemError if what is measured could not be written there, or would replace what is to stay."""
    if out and (out.is_dir() or not out.parent.is_dir()):
        raise TandemError(f"cannot write {out}: give --out a file in a folder that exists")
    if out:
        check_new(out, overwrite)


def warm_up(executor: Executor, config: ServingConfig) -> None:
    """Serve a small batch, so that what happens once (kernels compiled, graphs captured) is in no figure."""
    requests, prompt, output = WARM_UP
    half = max(1, config.max_model_len // 2)
    serve_batch(executor, Batch(min(requests, config.max_seqs), min(prompt, half)), min(output, half), config)


def serve_batch(executor: Executor, batch: Batch, outputs: int, config: ServingConfig) -> RunRecords:
    """The records of a batch that is handed in at once, of whose requests each makes `outputs` tokens."""
    trace = synthetic(batch.size, 0, f"fixed:{batch.input_len}", f"fixed:{outputs}")
    recorder = Recorder()
    executor.serve(trace.requests, config, recorder)
    return RunRecords({}, recorder.tables())


def _document(
    benchmark: Benchmark,
    executor: Executor,
    config: ServingConfig,
    rows: list[Row],
    partial: bool,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "schema": SCHEMA_VERSION,
        "benchmark": benchmark.name,
        "partial": partial,
        "how": benchmark.how,
        "model": executor.model.name,
        "dtype": executor.dtype,
        **facts,
        "system": manifest.system(executor.device, config),
        "provenance": manifest.provenance(backend="executor", kernels=executor.kernels),
        "rows": rows,
    }


def _show(benchmark: Benchmark, document: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(document, indent=2))
        return
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    state = ", partial" if document["partial"] else ""
    console.print(f"{document['model']}, {document['dtype']}, {document['system']['device']}{state}\n")
    for part in benchmark.tables(document["rows"]):
        console.print(part)


def decode_steps(tables: Sequence[pa.Table], batch: int, slack: int = 0) -> dict[str, int | float | None]:
    """Times of the steps that only decode, `batch` sequences give or take `slack`, over several runs.

    Args:
        tables: `steps` of each run.

    Returns:
        `steps`: how many; and the p50 and p99 in microseconds of `host` (from the clock read to the launched step:
        schedule, prepare, launch) and `device` (the data plane's work on it), None where there are no such steps.
    """
    host, device = [np.empty(0)], [np.empty(0)]
    for steps in tables:
        decodes = column(steps, "decode_tokens")
        chosen = (column(steps, "chunks") == 0) & (np.abs(decodes - batch) <= slack)
        host.append((column(steps, "launched_ns") - column(steps, "scheduled_ns"))[chosen] / 1e3)
        device.append(column(steps, "device_ns")[chosen] / 1e3)
    times = {"host": np.concatenate(host), "device": np.concatenate(device)}
    return {"steps": len(times["host"])} | {
        f"p{percent}_{name}_us": _percentile(values, percent) for name, values in times.items() for percent in (50, 99)
    }


def _percentile(values: Floats, percent: int) -> float | None:
    return float(np.percentile(values, percent)) if values.size else None


# -- tables --------------------------------------------------------------------------------------------


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Cells under `columns`: the first to the left, numbers to the right."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, name in enumerate(columns):
        made.add_column(name, justify="right" if position else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def number(value: float | None) -> str:
    """With three digits or more; whole numbers whole."""
    if value is None:
        return "–"
    digits = 0 if value == int(value) or abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:,.{digits}f}"
