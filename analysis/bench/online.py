"""Times the engine under load: requests that arrive, at several rates or all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from analysis.bench.common import Benchmark, Row, decode_steps, warmed_up
from analysis.jobs.limits import real_limits
from analysis.jobs.options import Limits, RunOptions
from analysis.jobs.progress import Progress
from analysis.jobs.run import real_run
from analysis.metrics.names import COMPARED_STATISTICS, latency_key
from analysis.metrics.summary import metrics, not_completed
from analysis.report.caveats import NOTHING_COMPLETED, missing_sentences
from analysis.report.tables import TextTable, amount
from engine.config import ServingConfig
from engine.records.run_folder import RunRecords, check_out
from traces.arrivals import assign_arrivals
from traces.errors import TandemError
from traces.trace import Trace

if TYPE_CHECKING:
    from engine.executor.executor import Executor

BURST = 2000  # requests of `all at once`
DECODE_BATCHES = (64, 256)  # the batches for which a run's decode steps are timed,
SLACK = 8  # give or take an eighth
LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2E", "per_token": "Per token: E2E / (prompt + output tokens)"}
COUNTS = ("completed", "rejected", "preemptions", "request_throughput", "output_throughput")
STEP_TIMES = {"steps": "steps", "p50_host_us": "host p50", "p99_host_us": "p99", "p50_device_us": "device p50"}
HOW = (
    "metrics: vLLM's benchmark's, ms, mean, min and max over the runs (one a seed); decode_steps: steps that "
    f"only decode, about so many sequences (give or take 1/{SLACK}), of all runs; host: from the clock read to "
    "the launched step; device: work on the step"
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A row's workloads.

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
        overwrite: whether runs there are replaced.
    """

    scenarios: Sequence[Scenario]
    limits: Limits
    keep: Path | None
    overwrite: bool = False

    def check(self) -> None:
        """Raises TandemError if a run may not be written to its folder."""
        if self.keep:
            for run in (run for scenario in self.scenarios for run in scenario.traces):
                check_out(self.keep / run, self.overwrite)

    def on(self, executor: Executor, progress: Progress, **facts: Any) -> Benchmark:
        """The benchmark of a loaded model, with as many KV blocks as memory holds."""
        settled = real_limits(executor, self.limits)
        facts |= warmed_up(executor, settled, progress)
        return Benchmark("online", HOW, facts, self._measure(executor, settled.config, progress), _tables)

    def _measure(self, executor: Executor, config: ServingConfig, progress: Progress) -> Iterator[Row]:
        """Yields a scenario's row after each of its runs."""
        options = RunOptions(overwrite=self.overwrite)
        with TemporaryDirectory() as scratch:
            folder = self.keep or Path(scratch)
            for scenario in self.scenarios:
                runs: dict[str, RunRecords] = {}
                for name, trace in scenario.traces.items():
                    progress.note(f"{name}:")
                    runs[name] = real_run(trace, executor, config, folder / name, progress, options)
                    yield _row(scenario, runs)


def _row(scenario: Scenario, runs: Mapping[str, RunRecords]) -> Row:
    summaries = {name: metrics(run) for name, run in runs.items()}
    steps = [run.tables["steps"] for run in runs.values()]
    return {
        "row": scenario.name,
        "rate": scenario.rate,
        "requests": len(next(iter(scenario.traces.values())).requests),
        "metrics": _over_runs([*summaries.values()]),
        "decode_steps": {str(batch): decode_steps(steps, batch, batch // SLACK) for batch in DECODE_BATCHES},
        "runs": summaries,
        "not_completed": {name: not_completed(run) for name, run in runs.items()},
    }


def _over_runs(summaries: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Mean and range of each metric over the runs that have it."""
    spread: dict[str, dict[str, float | None]] = {}
    for name in summaries[0]:
        values = [value for each in summaries if (value := each[name]) is not None]
        some = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)} if values else {}
        spread[name] = dict.fromkeys(("mean", "min", "max")) | some
    return spread


# -- tables ----------------------------------------------------------------------------------------------------


def _tables(rows: Sequence[Row]) -> Iterator[TextTable]:
    """Requests that did not complete, counts and rates, each latency, and the decode steps."""
    if missing := "\n".join(_missing(rows)):
        yield TextTable(missing, "Latencies are of the requests that completed.", (), ())
    counts = {name: name.replace("_", " ") for name in COUNTS}
    yield _metrics_table("Served (mean over seeds; lowest to highest; throughputs a second)", counts, rows)
    for latency, title in LATENCIES.items():
        columns = {latency_key(statistic, latency): statistic for statistic in COMPARED_STATISTICS}
        if any(row["metrics"][key]["mean"] is not None for row in rows for key in columns):
            yield _metrics_table(f"{title}, ms", columns, rows)
    batches = [(batch, key) for batch in DECODE_BATCHES for key in STEP_TIMES]
    heads = [f"~{batch}: {key}" if key == "steps" else STEP_TIMES[key] for batch, key in batches]
    cells = [(row["row"], *(amount(row["decode_steps"][str(batch)][key]) for batch, key in batches)) for row in rows]
    yield TextTable("Steps that decode about 64 and about 256 sequences, µs", "", ("", *heads), cells)


def _missing(rows: Sequence[Row]) -> Iterator[str]:
    """Requests that did not complete, by run; nothing where all did."""
    for row in rows:
        for run, groups in row["not_completed"].items():
            yield from (f"{run}: {sentence}" for sentence in missing_sentences(groups, row["requests"]))
            if not row["runs"][run]["completed"]:
                yield f"{run}: {NOTHING_COMPLETED}"


def _metrics_table(title: str, columns: Mapping[str, str], rows: Sequence[Row]) -> TextTable:
    cells = [(row["row"], *(_spread(row["metrics"][key]) for key in columns)) for row in rows]
    return TextTable(title, "", ("", *columns.values()), cells)


def _spread(of: Mapping[str, float | None]) -> str:
    """Whole numbers are shown whole."""
    whole = {name: value if value is None or value % 1 else int(value) for name, value in of.items()}
    mean, low, high = (amount(whole[name]) for name in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low}–{high})"
