"""Times the engine under load: requests that arrive, at several rates or all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from rich.table import Table

from analysis.bench.common import Row, decode_steps, number, table
from analysis.jobs.limits import Settled, real_limits
from analysis.jobs.options import Limits
from analysis.jobs.progress import Progress, following
from analysis.jobs.run import real_run
from analysis.metrics.summary import metrics, not_completed
from analysis.report.caveats import NOTHING_COMPLETED, missing_sentences
from engine.config import ServingConfig
from engine.records.recorder import Recorder
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
STATISTICS = ("mean", "p50", "p90", "p99")


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
        overwrite: whether runs there are replaced.
    """

    name: ClassVar[str] = "online"

    scenarios: Sequence[Scenario]
    limits: Limits
    keep: Path | None
    overwrite: bool = False

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
                check_out(self._folder(run), self.overwrite)

    def _folder(self, run: str) -> Path:
        return (self.keep or Path()) / run

    def settled(self, executor: Executor) -> Settled:
        """As many KV blocks as memory holds."""
        return real_limits(executor, self.limits)

    def measure(self, executor: Executor, config: ServingConfig, progress: Progress) -> Iterator[Row]:
        """Yields a scenario's row after each of its runs."""
        for scenario in self.scenarios:
            runs: dict[str, RunRecords] = {}
            for name, trace in scenario.traces.items():
                progress.note(f"{name}:")
                runs[name] = self._serve(name, trace, executor, config, progress)
                yield _online_row(scenario, runs)

    def _serve(
        self, name: str, trace: Trace, executor: Executor, config: ServingConfig, progress: Progress
    ) -> RunRecords:
        if self.keep:
            return real_run(trace, executor, config, self.keep / name, progress, overwrite=self.overwrite)
        recorder = Recorder()
        with following(progress, "run", recorder, len(trace.requests)):
            executor.serve(trace.requests, config, recorder)
        return RunRecords({}, recorder.tables())

    def tables(self, rows: Sequence[Row]) -> Iterator[Table | str]:
        """Whom it did not serve, what was served, each latency, and the decode steps: a table each, with a row for each
        scenario."""
        yield from _missing(rows)
        served = {"completed": "completed", "rejected": "rejected", "preemptions": "preemptions"}
        rates = {"request_throughput": "req/s", "output_throughput": "output tok/s"}
        yield _metrics_table("Served (mean over seeds; lowest to highest)", served | rates, rows)
        for latency, title in LATENCIES.items():
            columns = {f"{statistic}_{latency}_ms": statistic for statistic in STATISTICS}
            if any(row["metrics"][key]["mean"] is not None for row in rows for key in columns):
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
        "not_completed": {name: not_completed(run) for name, run in runs.items()},
    }


def _missing(rows: Sequence[Row]) -> Iterator[str]:
    """Requests that did not complete, by run; nothing where all did."""
    for row in rows:
        for run, groups in row["not_completed"].items():
            yield from (f"{run}: {sentence}" for sentence in missing_sentences(groups, row["requests"]))
            if not row["runs"][run]["completed"]:
                yield f"{run}: {NOTHING_COMPLETED}"
    if any(groups for row in rows for groups in row["not_completed"].values()):
        yield "Latencies are of the requests that completed."


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


def _spread(of: Mapping[str, float | None]) -> str:
    mean, low, high = (number(of[name]) for name in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low}–{high})"
