"""Times the simulator: the cost of a step, by part, the memory of a run, and the time to a first result.

The unit that holds on any machine is a bare SimPy timeout, timed in the same process. Every workload has a process of
its own, so that its peak memory is its own.
"""

from __future__ import annotations

import cProfile
import multiprocessing
import pstats
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import simpy

from analysis.bench.common import TANDEM, Benchmark, Row
from analysis.jobs.limits import Settled, simulated_limits
from analysis.jobs.options import Limits
from analysis.jobs.progress import Progress, Silent
from analysis.jobs.run import check_before, of_simulator, simulate_run
from analysis.metrics.summary import metrics
from analysis.report.tables import TextTable, amount
from engine.config import ServingConfig
from engine.records import manifest
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords, RunWriter, StoredTables
from sim.profile.format import Profile, read_profile
from sim.simulate import predict
from traces.arrivals import assign_arrivals
from traces.errors import TandemError
from traces.synthetic import synthetic
from traces.trace import Trace, read_trace, write_trace

TIMEOUTS = 50_000  # that time the unit
STEADY, STEADY_OUTPUT = 256, 1400  # sequences of the steady workload, and tokens that each makes
FIRST_RESULT = 20  # requests of the run that tells how soon a first result is there
PHASES = ("simulate", "last rows", "metrics", "finish")
FIGURES = {
    "steps_per_s": "steps/s",
    "us_per_step": "µs/step",
    "timeouts_per_step": "timeouts/step",
    "peak_mb": "peak MB",
}
OTHER = "other"
SPAWN = multiprocessing.get_context("spawn")
HOW = (
    "seconds: best of the repeats, from the first event to a written run, the trace read and the manifest's versions "
    "left out; timeout_us: a bare SimPy timeout in the same process, best; timeouts_per_step: each repeat's seconds in "
    "those timed right before and after it, median; peak_mb: of that process, everything imported, "
    "after its first run; parts: of one more run, under cProfile; start: wall time of tandem simulate as a process"
)

PARTS = {
    "serving loop": ("engine/serving_loop.py",),
    "scheduler": ("engine/scheduler/", "engine/decode_set.py", "engine/request.py", "engine/kv_blocks.py"),
    "step, digest": ("engine/step.py",),
    "latency model": ("sim/latency_model.py", "sim/profile/", "engine/model/graph_sizes.py"),
    "backend": ("sim/", "engine/copy_order.py", "engine/events.py", "engine/backend.py"),
    "SimPy": ("/simpy/",),
    "records": ("engine/records/recorder.py", "engine/records/run_folder.py", "/pyarrow/"),
    "metrics": ("analysis/metrics/", "/numpy/"),
}
"""Parts of the simulator by source file; the first that fits counts."""


@dataclass(frozen=True, slots=True)
class SimulateBench:
    """Which workloads the simulator is timed on.

    Attributes:
        trace: whose lengths are taken, over and over if it has fewer requests than wanted.
        profile: a profile's folder.
        limits: of every run.
        rates: requests a second, a row each.
        requests: of each of these rows, and of one where they arrive all at once.
        scale: numbers of requests, a row each, at the highest of `rates`, timed once.
        repeats: how often every other row is timed.
    """

    trace: Path
    profile: Path
    limits: Limits
    rates: Sequence[float]
    requests: int
    scale: Sequence[int]
    repeats: int

    def read(self) -> tuple[Profile, Settled]:
        """The profile, and the limits, with its KV blocks. Raises TandemError if either is bad."""
        profile = read_profile(self.profile)
        return profile, simulated_limits(profile, self.limits)

    def check(self) -> None:
        """Raises TandemError now for what would otherwise come to light in another process."""
        check_before(self.read()[1].config)
        if not self.rates:
            raise TandemError("no load: give --rates 6,2, for example")

    def on(self, progress: Progress) -> Benchmark:
        """The benchmark. The time to a first result is measured at once."""
        profile, settled = self.read()
        settled.say(progress)
        with progress.status("bench simulate: start"):
            start_s = min(self._start_s() for _ in range(self.repeats))
        parts = manifest.compose(config=settled.config, **of_simulator(profile))
        facts = {"profile": profile.name} | parts | {"start_s": start_s}
        return Benchmark("simulate", HOW, facts, self._measure(progress), lambda rows: _tables(rows, start_s))

    def _start_s(self) -> float:
        """Seconds from nothing to the result of a short run, as a user waits for it."""
        with TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.parquet"
            write_trace(trace, _timed(read_trace(self.trace), FIRST_RESULT, max(self.rates)))
            options = ("--trace", trace, "--profile", self.profile, "--out", Path(folder) / "run", "--json")
            command = [*TANDEM, "simulate", *map(str, options)]
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            return time.perf_counter() - start

    def _measure(self, progress: Progress) -> Iterator[Row]:
        """Yields each workload's row, measured in a process of its own."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "trace.parquet"
            for name, trace, repeats in self._workloads():
                write_trace(path, trace)
                with progress.status(f"bench simulate: {name}"), ProcessPoolExecutor(1, SPAWN) as pool:
                    yield {"row": name} | pool.submit(_row, self, path, repeats).result()

    def _workloads(self) -> Iterator[tuple[str, Trace, int]]:
        """Name, trace and repeats of each."""
        given, count, most = read_trace(self.trace), self.requests, max(self.rates)
        for rate in self.rates:
            yield f"{count:,} at {rate:g} req/s", _timed(given, count, rate), self.repeats
        yield f"{count:,} at once", _timed(given, count, None), self.repeats
        steady = synthetic(STEADY, 0, "uniform:64:192", f"fixed:{STEADY_OUTPUT}")
        yield f"{STEADY} in flight, steady", steady, self.repeats
        for many in self.scale:
            yield f"{many:,} at {most:g} req/s", _timed(given, many, most), 1


def _timed(given: Trace, count: int, rate: float | None) -> Trace:
    """So many requests, arriving at `rate` a second, or all at once."""
    lengths = islice(cycle(given.requests), count)
    untimed = Trace([replace(each, id=number, arrival_ns=0, cancel_ns=None) for number, each in enumerate(lengths)])
    return assign_arrivals(untimed, "poisson", rate=rate) if rate else untimed


# -- in a process of its own -------------------------------------------------------------------------------


def _row(bench: SimulateBench, path: Path, repeats: int) -> Row:
    trace, (profile, settled) = read_trace(path), bench.read()
    config = settled.config
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        simulate_run(trace, profile, config, out, Silent())
        peak_mb = _peak_mb()

        def run() -> list[float]:
            return _run(trace, profile, config, out)

        timed = [_beside_timeouts(run) for _ in range(repeats)]
        parts = _parts(run) if repeats > 1 else {}
        steps = len(StoredTables(out).select("steps", ["step"]))
    run_s = min((phases for phases, _ in timed), key=sum)
    seconds = sum(run_s)
    return {
        "requests": len(trace.requests),
        "steps": steps,
        "seconds": seconds,
        "of_these": dict(zip(PHASES, run_s, strict=True)),
        "steps_per_s": steps / seconds,
        "us_per_step": 1e6 * seconds / steps,
        "timeout_us": 1e6 * min(timeout_s for _, timeout_s in timed),
        "timeouts_per_step": median(sum(phases) / timeout_s for phases, timeout_s in timed) / steps,
        "peak_mb": peak_mb,
        "parts": parts,
    }


def _run(trace: Trace, profile: Profile, config: ServingConfig, out: Path) -> list[float]:
    """Seconds of each of `PHASES`."""
    reads = [time.perf_counter()]
    with RunWriter(out, overwrite=True) as writer:
        recorder = Recorder(writer.add)
        predict(trace.requests, config, profile, recorder)
        reads.append(time.perf_counter())
        recorder.close()
        written = writer.written()
        reads.append(time.perf_counter())
        summary = metrics(RunRecords({}, written))
        reads.append(time.perf_counter())
        writer.finish(RunRecords({}, {}, summary))
    reads.append(time.perf_counter())
    return [end - start for start, end in pairwise(reads)]


def _beside_timeouts(run: Callable[[], list[float]]) -> tuple[list[float], float]:
    """A run's result, and the seconds of a bare timeout around it. A machine's speed may change from run to run."""
    before, phases = _timeout_s(), run()
    return phases, (before + _timeout_s()) / 2


def _timeout_s() -> float:
    """Seconds that a process's bare timeout takes, event loop included."""

    def process() -> Iterator[simpy.Event]:
        for _ in range(TIMEOUTS):
            yield env.timeout(1)

    env = simpy.Environment(initial_time=0)
    start = time.perf_counter()
    env.run(until=env.process(process()))
    return (time.perf_counter() - start) / TIMEOUTS


def _peak_mb() -> float:
    """The most memory that this process has held, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 / 1e6


def _parts(run: Callable[[], object]) -> dict[str, float]:
    """Shares of a run's time by `PARTS`. Built-in functions count for the file that calls them."""
    profile = cProfile.Profile(builtins=False)
    profile.runcall(run)
    seconds: Counter[str] = Counter()
    for (file, _, _), (_, _, own_s, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        seconds[next((part for part, places in PARTS.items() if any(each in file for each in places)), OTHER)] += own_s
    return {part: seconds[part] / sum(seconds.values()) for part in (*PARTS, OTHER)}


# -- tables ------------------------------------------------------------------------------------------------


def _tables(rows: Sequence[Row], start_s: float) -> Iterator[TextTable]:
    cells = []
    for row in rows:
        seconds = [f"{phase:.3f}" for phase in (row["seconds"], *row["of_these"].values())]
        cells.append((row["row"], f"{row['steps']:,}", *seconds, *(amount(row[name]) for name in FIGURES)))
    note = f"From nothing to the result of {FIRST_RESULT} requests: {start_s:.2f} s"
    yield TextTable("Simulated", note, ("requests", "steps", "seconds", *PHASES, *FIGURES.values()), cells)
    shares = [(row["row"], *(f"{share:.0%}" for share in row["parts"].values())) for row in rows if row["parts"]]
    yield TextTable("Where the time goes", "", ("requests", *PARTS, OTHER), shares)
