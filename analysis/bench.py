"""Times the engine on this machine as other engines are timed: batches handed in at once, and requests that arrive.

Everything comes from the records of real runs, none of it from a stopwatch beside them. A benchmark yields its rows
while it measures, so that whatever ends it early leaves what is known by then.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from analysis.metrics import NS_PER_MS, Floats, column, completed_requests, metrics
from analysis.options import Limits
from analysis.workflow import progress_bar, real_config, real_run, watched
from engine import manifest
from engine.config import ServingConfig
from engine.recorder import Recorder
from engine.records import RunRecords, check_out
from engine.scheduler import load_scheduler
from traces.arrivals import assign_arrivals
from traces.errors import TandemError
from traces.format import Trace, atomic_file
from traces.synthetic import synthetic

if TYPE_CHECKING:
    import pyarrow as pa

    from engine.executor.executor import Executor

SCHEMA_VERSION = 1
BURST = 2000  # requests of `all at once`
WARM_UP = (8, 16, 4)  # requests, prompt tokens, output tokens
DECODE_BATCHES = (64, 256)  # the batches for which an online run's decode steps are timed,
SLACK = 8  # give or take an eighth
TABLE_WIDTH = 160  # a table is cut off at no less than this, so that a pipe gets all of it
LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2E", "per_token": "Per token: E2E / (prompt + output tokens)"}
STATISTICS = ("mean", "p50", "p90", "p99")

Row = dict[str, Any]
Read = TypeVar("Read")


class Batch(NamedTuple):
    """Equal requests, handed in at once."""

    size: int
    input_len: int

    def __str__(self) -> str:
        return f"{self.size}x{self.input_len}"

    def blocks(self, outputs: int, block_size: int) -> int:
        """KV blocks that it needs to make `outputs` tokens a request after the first."""
        return self.size * -(-(self.input_len + outputs) // block_size)


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

    def config(self, executor: Executor) -> ServingConfig:
        """The limits of all its runs."""

    def measure(self, executor: Executor, config: ServingConfig, console: Console) -> Iterator[Row]:
        """Yields each row, by its `row`, and again whenever more is known of it."""

    def tables(self, rows: Sequence[Row]) -> Iterator[Table | str]:
        """The rows for people."""


def run_benchmark(
    benchmark: Benchmark, executor: Executor, out: Path | None, as_json: bool, console: Console, **facts: Any
) -> None:
    """Run a benchmark and print what it finds, as tables or JSON, on standard output.

    Whatever ends it early (Ctrl-C, a failing data plane) is raised once the rows so far are printed, marked partial.

    Args:
        out: a file that gets the JSON too.
        console: for progress.
        facts: what else the JSON should say of the run.

    Raises:
        TandemError: the limits cannot be served with, or `out` cannot be written.
    """
    config = benchmark.config(executor)
    with console.status("warming up"):
        warm_up(executor, config)
    rows: dict[str, Row] = {}
    failure: BaseException | None = None
    try:
        for row in benchmark.measure(executor, config, console):
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


def check_benchmark(benchmark: Benchmark, out: Path | None) -> None:
    """Raises TandemError now for what would otherwise come to light after minutes: a bad policy, limit or folder."""
    benchmark.check()
    load_scheduler(benchmark.limits.config(num_blocks=1))
    check_out_file(out)


def check_out_file(out: Path | None) -> None:
    """Raises TandemError if what is measured could not be written there."""
    if out and (out.is_dir() or not out.parent.is_dir()):
        raise TandemError(f"cannot write {out}: give --out a file in a folder that exists")


def warm_up(executor: Executor, config: ServingConfig) -> None:
    """Serve a small batch, so that what happens once (kernels compiled, graphs captured) is in no figure."""
    requests, prompt, output = WARM_UP
    half = max(1, config.max_model_len // 2)
    _serve(executor, Batch(min(requests, config.max_seqs), min(prompt, half)), min(output, half), config)


def _serve(executor: Executor, batch: Batch, outputs: int, config: ServingConfig) -> RunRecords:
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


# -- options -----------------------------------------------------------------------------------------------


def listed(option: str, text: str, read: Callable[[str], Read], example: str) -> tuple[Read, ...]:
    """What an option lists with commas between, each once.

    Args:
        option: its name, for the error.
        text: what the user wrote.
        read: reads one item, raising ValueError if it is none.
        example: of how to write it.

    Raises:
        TandemError: an item cannot be read.
    """
    items: dict[Read, None] = {}
    for item in filter(None, text.split(",")):
        try:
            items[read(item)] = None
        except ValueError:
            raise TandemError(f"{option}: cannot read '{item}'; write, for example, {option} {example}") from None
    return tuple(items)


def read_batch(text: str) -> Batch:
    """Read BATCHxINPUT. Raises ValueError if it is not two numbers of 1 or more."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise ValueError(text)
    return Batch(int(found[1]), int(found[2]))


def read_rate(text: str) -> float:
    """Read requests a second. Raises ValueError if it is not a number above 0."""
    rate = float(text)
    if not 0 < rate < math.inf:
        raise ValueError(text)
    return rate


def read_count(text: str) -> int:
    """Read how many. Raises ValueError if it is not a number of 1 or more."""
    count = int(text)
    if count < 1:
        raise ValueError(text)
    return count


def read_seed(text: str) -> int:
    """Read a seed. Raises ValueError if it is not a number of 0 or more."""
    seed = int(text)
    if seed < 0:
        raise ValueError(text)
    return seed


# -- one forward -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Forward:
    """Times of a prefill and of a decode step, with the spans of vLLM's offline benchmark.

    Attributes:
        batches: one for each row.
        outputs: decode steps that are timed.
        repeats: of each measurement.
        said: limits, but for those that the batches imply.
    """

    name: ClassVar[str] = "forward"

    batches: Sequence[Batch]
    outputs: int
    repeats: int
    said: Limits

    @property
    def how(self) -> str:
        """What a prefill and a decode are."""
        return (
            "prefill: from handing in a batch to its last first token, host included; "
            f"decode: ({self.outputs + 1} output tokens' time - 1 output token's) / {self.outputs}, "
            f"medians of {self.repeats}; host: from the clock read to the launched step; device: work on the step; "
            "both of steps that decode the whole batch, medians"
        )

    @property
    def limits(self) -> Limits:
        """Limits under which every batch runs as one."""
        return replace(self.said, **self._implied(self.batches))

    def _implied(self, batches: Sequence[Batch]) -> dict[str, Any]:
        longest = max(batch.input_len for batch in batches) + self.outputs + 1
        return {"max_seqs": max(batch.size for batch in batches), "max_model_len": longest}

    def check(self) -> None:
        """Raises TandemError if there is no row."""
        if not self.batches:
            raise TandemError("nothing to time: give --rows 1x128, for example")

    def config(self, executor: Executor) -> ServingConfig:
        """As many KV blocks as memory holds, and limits for the batches that fit into them."""
        config = self._room(executor)
        held = [batch for batch in self.batches if batch.blocks(self.outputs, config.block_size) <= config.num_blocks]
        return replace(config, **self._implied(held or self.batches))

    def _room(self, executor: Executor) -> ServingConfig:
        """The limits of the longest batch of whose requests memory holds one, at least."""
        for input_len in sorted({batch.input_len for batch in self.batches}, reverse=True):
            try:
                return real_config(executor, replace(self.limits, max_model_len=input_len + self.outputs + 1))
            except TandemError as error:
                refusal = error
        raise refusal

    def measure(self, executor: Executor, config: ServingConfig, console: Console) -> Iterator[Row]:
        """Yields a row after each of its repeats; one that memory does not hold says so in `not_measured`."""
        with progress_bar(console, "bench forward", len(self.batches) * self.repeats) as show:
            for number, batch in enumerate(self.batches):
                for repeat, row in enumerate(self._row(batch, executor, config), start=1):
                    yield row
                    show(number * self.repeats + repeat)
                show((number + 1) * self.repeats)

    def _row(self, batch: Batch, executor: Executor, config: ServingConfig) -> Iterator[Row]:
        needed, row = batch.blocks(self.outputs, config.block_size), _unmeasured(batch)
        if needed > config.num_blocks:
            held = "memory holds" if self.said.num_blocks is None else "--kv-blocks gives"
            yield row | {"not_measured": f"needs {needed:,} KV blocks, more than {held}"}
            return
        try:
            yield from (row | measured for measured in self._repeats(batch, executor, config))
        except TandemError as error:
            yield row | {"not_measured": str(error).splitlines()[0]}

    def _repeats(self, batch: Batch, executor: Executor, config: ServingConfig) -> Iterator[Row]:
        first_ms, last_ms, steps = [], [], []
        for _ in range(self.repeats):
            first_ms.append(_wall_ms(_serve(executor, batch, 1, config)))
            run = _serve(executor, batch, 1 + self.outputs, config)
            last_ms.append(_wall_ms(run))
            steps.append(run.tables["steps"])
            prefill_ms = float(np.median(first_ms))
            decode_ms = (float(np.median(last_ms)) - prefill_ms) / self.outputs
            yield {
                "prefill_ms": prefill_ms,
                "decode_ms": decode_ms,
                "prefill_tokens_per_s": 1e3 * batch.size * batch.input_len / prefill_ms,
                "decode_tokens_per_s": 1e3 * batch.size / decode_ms if decode_ms > 0 else None,
                "decode_steps": decode_steps(steps, batch.size),
                "prefill_walls_ms": [*first_ms],
                "decode_walls_ms": [*last_ms],
            }

    def tables(self, rows: Sequence[Row]) -> Iterator[Table | str]:
        """One table, and a line for each row that could not be measured."""
        columns = ("batch x input", "prefill ms", "tok/s", "decode ms", "tok/s", "host µs", "device µs")
        yield table(
            "One forward",
            columns,
            [
                (
                    row["row"],
                    *(number(row[key]) for key in ("prefill_ms", "prefill_tokens_per_s")),
                    *(number(row[key]) for key in ("decode_ms", "decode_tokens_per_s")),
                    *(number(row["decode_steps"][key]) for key in ("p50_host_us", "p50_device_us")),
                )
                for row in rows
            ],
        )
        yield from (f"{row['row']}: not measured: {row['not_measured']}" for row in rows if row["not_measured"])


def _unmeasured(batch: Batch) -> Row:
    unknown = ("prefill_ms", "decode_ms", "prefill_tokens_per_s", "decode_tokens_per_s")
    return {
        "row": str(batch),
        "batch": batch.size,
        "input_len": batch.input_len,
        **dict.fromkeys(unknown),
        "decode_steps": decode_steps([], batch.size),
        "prefill_walls_ms": [],
        "decode_walls_ms": [],
        "not_measured": None,
    }


def _wall_ms(run: RunRecords) -> float:
    """From the run's start to its last token. Raises TandemError if a request was not served."""
    requests, done = run.tables["requests"], completed_requests(run)
    if len(done) < len(requests):
        reason = next(filter(None, requests["reason"].to_pylist()), "they did not end")
        raise TandemError(f"{len(requests) - len(done)} of {len(requests)} requests were not served: {reason}")
    return float(column(done, "last_token_ns").max()) / NS_PER_MS


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


# -- online ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scenario:
    """One load.

    Attributes:
        name: of its row.
        rate: requests a second; None: all at once.
        traces: what is served, one after the other, by the name of the run's folder.
    """

    name: str
    rate: float | None
    traces: Mapping[str, Trace]


def scenarios(
    trace: Trace, rates: Sequence[float], seeds: Sequence[int], seconds: float, all_at_once: bool
) -> tuple[Scenario, ...]:
    """Poisson arrivals of each rate for so many seconds, with each seed; then `BURST` requests at once.

    Every run takes the trace's requests in order from its first: seeds differ in arrivals alone.

    Raises:
        TandemError: the trace has too few requests, or there is nothing to serve.
    """
    found = []
    for rate in rates:
        requests = _first(trace, round(rate * seconds), f"{rate:g} requests a second for {seconds:g} s")
        timed = {
            f"rate-{rate:g}-seed-{seed}": assign_arrivals(requests, "poisson", rate=rate, seed=seed) for seed in seeds
        }
        found.append(Scenario(f"{rate:g} req/s", rate, timed))
    if all_at_once:
        burst = assign_arrivals(_first(trace, BURST, "--all-at-once"), "all_at_once")
        found.append(Scenario("all at once", None, {"all-at-once": burst}))
    if not any(each.traces for each in found):
        raise TandemError("nothing to serve: give --rates and --seeds, or --all-at-once")
    return tuple(found)


def _first(trace: Trace, count: int, load: str) -> Trace:
    if not 1 <= count <= len(trace.requests):
        raise TandemError(
            f"the trace has {len(trace.requests):,} requests, {load} needs {count:,}: "
            "give another --trace, or other --rates or --seconds"
        )
    return replace(trace, requests=trace.requests[:count])


@dataclass(frozen=True, slots=True)
class Online:
    """Serves requests as they arrive; every one runs to the output length that its trace gives.

    Attributes:
        scenarios: one for each row.
        limits: of the runs.
        keep: a folder that gets the records of each run.
    """

    name: ClassVar[str] = "online"

    scenarios: Sequence[Scenario]
    limits: Limits
    keep: Path | None

    @property
    def how(self) -> str:
        """What the figures are."""
        return (
            "metrics: vLLM's benchmark's, ms, mean, min and max over the runs (one a seed); decode_steps: steps that "
            f"only decode, about so many sequences (give or take 1/{SLACK}), of all runs; host: from the clock read to "
            "the launched step; device: work on the step"
        )

    def check(self) -> None:
        """Raises TandemError if a run may not be written where it should."""
        for scenario in self.scenarios:
            for run in scenario.traces if self.keep else ():
                check_out(self._folder(run))

    def _folder(self, run: str) -> Path:
        return (self.keep or Path()) / run

    def config(self, executor: Executor) -> ServingConfig:
        """As many KV blocks as memory holds."""
        return real_config(executor, self.limits)

    def measure(self, executor: Executor, config: ServingConfig, console: Console) -> Iterator[Row]:
        """Yields a scenario's row after each of its runs."""
        for scenario in self.scenarios:
            runs: dict[str, RunRecords] = {}
            for name, trace in scenario.traces.items():
                console.print(f"{name}:", highlight=False)
                runs[name] = self._serve(name, trace, executor, config, console)
                yield _online_row(scenario, runs)

    def _serve(
        self, name: str, trace: Trace, executor: Executor, config: ServingConfig, console: Console
    ) -> RunRecords:
        if self.keep:
            return real_run(trace, executor, config, self.keep / name, console)
        recorder = Recorder()
        with watched(console, "run", recorder, len(trace.requests)):
            executor.serve(trace.requests, config, recorder)
        return RunRecords({}, recorder.tables())

    def tables(self, rows: Sequence[Row]) -> Iterator[Table | str]:
        """What was served, each latency, and the decode steps: a table each, with a row for each scenario."""
        served = {"completed": "completed", "rejected": "rejected", "preemptions": "preemptions"}
        rates = {"request_throughput": "req/s", "output_throughput": "output tok/s"}
        yield _metrics_table("Served (mean over seeds; lowest to highest)", served | rates, rows)
        for latency, title in LATENCIES.items():
            columns = {f"{statistic}_{latency}_ms": statistic for statistic in STATISTICS}
            yield _metrics_table(f"{title}, ms", columns, rows)
        yield _decode_table(rows)


def _online_row(scenario: Scenario, runs: Mapping[str, RunRecords]) -> Row:
    summaries = {name: metrics(run) for name, run in runs.items()}
    steps = [run.tables["steps"] for run in runs.values()]
    return {
        "row": scenario.name,
        "rate": scenario.rate,
        "requests": len(next(iter(scenario.traces.values())).requests),
        "metrics": _over_runs([*summaries.values()]),
        "decode_steps": {str(batch): decode_steps(steps, batch, batch // SLACK) for batch in DECODE_BATCHES},
        "runs": summaries,
    }


def _over_runs(summaries: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Mean and range of each metric over the runs that have it."""
    spread: dict[str, dict[str, float | None]] = {}
    for name in summaries[0]:
        values = [value for each in summaries if (value := each[name]) is not None]
        some = {"mean": float(np.mean(values)), "min": min(values), "max": max(values)} if values else {}
        spread[name] = dict.fromkeys(("mean", "min", "max")) | some
    return spread


def _metrics_table(title: str, columns: Mapping[str, str], rows: Sequence[Row]) -> Table:
    cells = [(row["row"], *(_spread(row["metrics"][key]) for key in columns)) for row in rows]
    return table(title, ("", *columns.values()), cells)


def _decode_table(rows: Sequence[Row]) -> Table:
    keys = {"steps": "steps", "p50_host_us": "host p50", "p99_host_us": "p99", "p50_device_us": "device p50"}
    columns = [
        f"~{batch}: {name}" if key == "steps" else name for batch in DECODE_BATCHES for key, name in keys.items()
    ]
    cells = [
        (row["row"], *(number(row["decode_steps"][str(batch)][key]) for batch in DECODE_BATCHES for key in keys))
        for row in rows
    ]
    return table("Steps that decode about 64 and about 256 sequences, µs", ("", *columns), cells)


# -- tables ------------------------------------------------------------------------------------------------


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Cells under `columns`: the first to the left, numbers to the right."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, name in enumerate(columns):
        made.add_column(name, justify="right" if position else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def _spread(of: Mapping[str, float | None]) -> str:
    mean, low, high = (number(of[name]) for name in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low}–{high})"


def number(value: float | None) -> str:
    """With three digits or more; whole numbers whole."""
    if value is None:
        return "–"
    digits = 0 if value == int(value) or abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:,.{digits}f}"
