"""Times the simulator: what a step of it costs, where that goes, how much memory a run takes, how soon it answers.

The unit that holds on any machine is a bare SimPy timeout, timed in the same process. Every load has a process of its
own, so that its peak memory is its own.
"""

from __future__ import annotations

import multiprocessing
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import simpy
from rich.console import Console
from rich.table import Table

from analysis.bench.common import TABLE_WIDTH, Row, number, table
from analysis.jobs.limits import simulated_limits
from analysis.jobs.options import Limits
from analysis.jobs.progress import Progress
from analysis.jobs.run import simulate_run
from analysis.metrics.summary import metrics
from analysis.report.console_progress import ConsoleProgress
from engine.config import ServingConfig
from engine.records import manifest
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords, RunWriter, StoredTables
from engine.scheduler import load_scheduler
from sim.profile.format import Profile, read_profile
from sim.simulate import predict
from traces.arrivals import assign_arrivals
from traces.errors import TandemError
from traces.synthetic import synthetic
from traces.trace import Trace, read_trace, write_trace

SCHEMA_VERSION = 1
TIMEOUTS = 50_000  # that time the unit
LOOK_EVERY_S, LOOK_FOR_S = 0.001, 1.0  # CPU time between two looks at what runs, and of all of them
STEADY, STEADY_OUTPUT = 256, 1400  # sequences of the steady load, and tokens that each makes
FIRST_RESULT = 20  # requests of the run that tells how soon a first result is there
PHASES = ("simulate", "last rows", "metrics", "finish")
OTHER = "other"
HOW = (
    "seconds: best of the repeats, from the first event to a written run, the trace read and the manifest's versions "
    "left out; timeout_us: a bare SimPy timeout in the same process, best; timeouts_per_step: each repeat's seconds in "
    "those timed right before and after it, median; peak_mb: of that process, everything imported, "
    "after its first run; start: wall time of tandem simulate as a process"
)

PARTS = {
    "serving loop": ("engine/serving_loop.py",),
    "scheduler": ("engine/scheduler/", "engine/decode_set.py", "engine/request.py", "engine/kv_blocks.py"),
    "step, digest": ("engine/step.py",),
    "latency model": ("sim/latency_model.py", "sim/profile/format.py", "engine/model/graph_sizes.py"),
    "backend": ("sim/", "engine/copy_order.py", "engine/events.py", "engine/backend.py"),
    "SimPy": ("/simpy/",),
    "records": ("engine/records/recorder.py", "engine/records/run_folder.py", "/pyarrow/"),
    "metrics": ("analysis/metrics/summary.py", "/numpy/"),
}
"""Where the time of a run goes, by source file; the first that fits."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is simulated: a trace's file, and how often it is timed."""

    name: str
    trace: Path
    repeats: int


@dataclass(frozen=True, slots=True)
class SimulateBench:
    """Which loads the simulator is timed on.

    Attributes:
        trace: whose lengths are served, over and over if it has fewer requests than wanted.
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

    def loads(self, folder: Path) -> Iterator[Load]:
        """Writes each workload to `folder` before it yields it."""
        given, count = read_trace(self.trace), self.requests
        for rate in self.rates:
            yield _load(folder, f"{count:,} at {rate:g} req/s", _timed(given, count, rate), self.repeats)
        yield _load(folder, f"{count:,} at once", _timed(given, count, None), self.repeats)
        steady = synthetic(STEADY, 0, "uniform:64:192", f"fixed:{STEADY_OUTPUT}")
        yield _load(folder, f"{STEADY} in flight, steady", steady, self.repeats)
        for many in self.scale:
            yield _load(folder, f"{many:,} at {max(self.rates):g} req/s", _timed(given, many, max(self.rates)), 1)

    def config(self, profile: Profile) -> ServingConfig:
        """The limits, with the profile's KV blocks."""
        return simulated_limits(profile, self.limits).config

    def check(self) -> None:
        """Raises TandemError now for what would otherwise come to light in another process."""
        load_scheduler(self.config(read_profile(self.profile)))
        if not self.rates:
            raise TandemError("no load: give --rates 6,2, for example")

    def run(self, progress: Progress) -> dict[str, Any]:
        """Measure everything, telling `progress`; returns it as JSON values."""
        times = read_profile(self.profile)
        simulated_limits(times, self.limits).say(progress)
        with TemporaryDirectory() as name:
            folder = Path(name)
            with progress.status("bench simulate: start"):
                start_s = min(self._start_s(folder) for _ in range(self.repeats))
            rows = []
            for load in self.loads(folder):
                with progress.status(f"bench simulate: {load.name}"):
                    rows.append(_in_its_own_process(self, load))
        return {
            "schema": SCHEMA_VERSION,
            "benchmark": "simulate",
            "how": HOW,
            "profile": times.name,
            "system": manifest.system(times.meta.device, self.config(times)),
            "provenance": manifest.provenance(backend="simulator", source=times.meta.source),
            "start_s": start_s,
            "rows": rows,
        }

    def _start_s(self, folder: Path) -> float:
        """Seconds from nothing to the result of a short run, as a user waits for it."""
        load = _load(folder, "first", _timed(read_trace(self.trace), FIRST_RESULT, max(self.rates)), 1)
        code = "from analysis.cli.main import main; main()"
        out = ("--out", folder / "first-run", "--overwrite", "--json")
        options = ("--trace", load.trace, "--profile", self.profile, *out)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, "simulate", *map(str, options)], check=True, capture_output=True)
        return time.perf_counter() - start


def _load(folder: Path, name: str, trace: Trace, repeats: int) -> Load:
    path = folder / "trace.parquet"
    write_trace(path, trace)
    return Load(name, path, repeats)


def _timed(given: Trace, count: int, rate: float | None) -> Trace:
    """So many requests, arriving at `rate` a second, or all at once."""
    lengths = islice(cycle(given.requests), count)
    untimed = Trace([replace(each, id=number, arrival_ns=0, cancel_ns=None) for number, each in enumerate(lengths)])
    return assign_arrivals(untimed, "poisson", rate=rate) if rate else untimed


# -- in a process of its own -------------------------------------------------------------------------------


def _in_its_own_process(bench: SimulateBench, load: Load) -> Row:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, bench, load).result()


def _measure(bench: SimulateBench, load: Load) -> Row:
    trace, profile = read_trace(load.trace), read_profile(bench.profile)
    config = bench.config(profile)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        simulate_run(trace, profile, config, out, ConsoleProgress(Console(quiet=True)))
        peak_mb = _peak_mb()
        timed = [_beside_timeouts(lambda: _run(trace, profile, config, out)) for _ in range(load.repeats)]
        run_s = min((phases for phases, _ in timed), key=sum)
        timeouts = median(sum(phases) / timeout_s for phases, timeout_s in timed)
        parts = _parts(lambda: _run(trace, profile, config, out)) if load.repeats > 1 else {}
        steps = len(StoredTables(out).select("steps", ["step"]))
    seconds = sum(run_s)
    return {
        "row": load.name,
        "requests": len(trace.requests),
        "steps": steps,
        "seconds": seconds,
        "of_these": dict(zip(PHASES, run_s, strict=True)),
        "steps_per_s": steps / seconds,
        "us_per_step": 1e6 * seconds / steps,
        "timeout_us": 1e6 * min(timeout_s for _, timeout_s in timed),
        "timeouts_per_step": timeouts / steps,
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
    """What a run returns, and the seconds of a bare timeout around it: a machine's speed may change from run to run."""
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


def _parts(work: Callable[[], object]) -> dict[str, float]:
    """Shares of the time by `PARTS`: what is seen to run when looked at every so often, for a while."""
    seen: Counter[str] = Counter()

    def look(_: int, frame: FrameType | None) -> None:
        seen[_part(frame)] += 1

    previous = signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, LOOK_EVERY_S, LOOK_EVERY_S)
    try:
        end = time.process_time() + LOOK_FOR_S
        while time.process_time() < end:
            work()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    return {part: seen[part] / seen.total() for part in (*PARTS, OTHER)}


def _part(frame: FrameType | None) -> str:
    """The innermost of `PARTS` that is running."""
    while frame is not None:
        for part, places in PARTS.items():
            if any(place in frame.f_code.co_filename for place in places):
                return part
        frame = frame.f_back
    return OTHER


# -- for people --------------------------------------------------------------------------------------------


def print_simulate(document: Mapping[str, Any]) -> None:
    """Print what `SimulateBench.run` found as tables, on standard output."""
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    console.print(f"{document['profile']}, {document['system']['scheduler']}\n")
    for each in _tables(document["rows"]):
        console.print(each)
    console.print(f"From nothing to the result of {FIRST_RESULT} requests: {document['start_s']:.2f} s")


def _tables(rows: Sequence[Row]) -> Iterator[Table]:
    columns = ("requests", "steps", "seconds", *PHASES, "steps/s", "µs/step", "timeouts/step", "peak MB")
    cells = [
        (
            row["row"],
            f"{row['steps']:,}",
            *(f"{seconds:.3f}" for seconds in (row["seconds"], *row["of_these"].values())),
            *(number(row[key]) for key in ("steps_per_s", "us_per_step", "timeouts_per_step", "peak_mb")),
        )
        for row in rows
    ]
    yield table("Simulated", columns, cells)
    shares = [(row["row"], *(f"{share:.0%}" for share in row["parts"].values())) for row in rows if row["parts"]]
    yield table("Where the time goes", ("requests", *PARTS, OTHER), shares)
