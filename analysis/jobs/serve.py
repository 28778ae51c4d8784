"""`tandem serve`: builds the rider, the tokenizer and the records' folder that the server is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from analysis.jobs.limits import config_to_check, real_limits, simulated_limits
from analysis.jobs.machine_watch import MachineWatch
from analysis.jobs.options import Limits, Loading
from analysis.jobs.progress import Progress
from analysis.jobs.run import check_before, load_executor
from analysis.metrics.summary import summarize
from analysis.report.console_progress import ConsoleProgress
from engine.config import ServingConfig
from engine.records import manifest
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from sim.profile.format import find_profile, read_profile
from sim.realtime import PacedRider
from sim.replay import recorded_requests
from traces.synthetic import draw_length
from traces.trace import Trace, write_trace

if TYPE_CHECKING:
    from analysis.client.load_client import Target
    from engine.executor.executor import Executor
    from engine.server.driver import Rider

TRACE = "trace.parquet"


@dataclass
class SimService:
    """Implements `engine.server.driver.Service` with the simulator.

    Attributes:
        profile: the latency profile's folder.
        limits: as the user said.
        filler: token ids that outputs repeat.
        vocab_size: of the tokenizer they are from.
        output: a distribution of output lengths, or None: requests run to their `max_tokens`.
        seed: of the lengths.
        out: where the records go, or None.
        overwrite: whether a run there is replaced.
    """

    profile: Path
    limits: Limits
    filler: Sequence[int]
    vocab_size: int
    output: str | None = None
    seed: int = 0
    out: Path | None = None
    overwrite: bool = False

    @property
    def records(self) -> bool:
        """As in `Service`."""
        return self.out is not None

    def check(self) -> None:
        """Raises TandemError now for what would otherwise come to light in another process; says the limits."""
        settled = simulated_limits(read_profile(find_profile(self.profile)), self.limits)
        _check(settled.config, self.out, self.overwrite)
        if self.output is not None:
            draw_length(self.output, self.seed, 0)
        settled.say(ConsoleProgress(Console(stderr=True)))

    def open(self) -> Rider:
        """As in `Service`."""
        self._profile = read_profile(find_profile(self.profile))
        self._settled = simulated_limits(self._profile, self.limits)
        self._rider = PacedRider(
            self._profile,
            self._settled.config,
            self.filler,
            self.vocab_size,
            None if self.output is None else self._draw,
            self.records,
        )
        return self._rider

    def keep(self, recorder: Recorder, start_ns: int, partial: bool) -> None:
        """As in `Service`."""
        profile, lag_ms = self._profile, self._rider.lag_ns / 1e6
        parts = {
            "system": manifest.system(profile.meta.device, self._rider.config),
            "provenance": manifest.provenance(
                backend="simulator",
                profile=profile.name,
                source=profile.meta.source,
                start_perf_ns=start_ns,
                **self._settled.facts,
            ),
        }

        def workload(trace: Trace) -> dict[str, Any]:
            return manifest.workload(trace, profile.model, profile.meta.dtype, "trace")

        assert self.out
        summary, prompts = {"pacing_lag_ms": lag_ms}, self._rider.prompts
        _write(recorder, workload, parts, self.out, self.overwrite, partial, prompts, summary)

    def _draw(self, request_id: int) -> int:
        assert self.output
        return draw_length(self.output, self.seed, request_id)


@dataclass
class RealService:
    """Implements `engine.server.driver.Service` with the executor; attributes as in `SimService`."""

    loading: Loading
    limits: Limits
    out: Path | None = None
    overwrite: bool = False

    @property
    def records(self) -> bool:
        """As in `Service`."""
        return self.out is not None

    def check(self) -> None:
        """As in `SimService`."""
        _check(config_to_check(self.limits), self.out, self.overwrite)

    def open(self) -> Rider:
        """As in `Service`."""
        from engine.server.executor_driver import RealRider

        progress = ConsoleProgress(Console(stderr=True))
        executor = self._executor = load_executor(self.loading, progress)
        self._settled = real_limits(executor, self.limits)
        self._settled.say(progress)
        self._rider = RealRider(executor, self._settled.config, self.records)
        self._machine = MachineWatch()
        return self._rider

    def keep(self, recorder: Recorder, start_ns: int, partial: bool) -> None:
        """As in `Service`."""
        executor: Executor = self._executor
        parts = {
            "system": manifest.system(executor.device, self._rider.config),
            "provenance": manifest.provenance(
                backend="executor",
                kernels=executor.kernels,
                start_perf_ns=start_ns,
                machine=self._machine.seen(),
                **self._settled.facts,
            ),
        }

        def workload(trace: Trace) -> dict[str, Any]:
            return manifest.workload(trace, executor.model, executor.dtype, "model")

        assert self.out
        _write(recorder, workload, parts, self.out, self.overwrite, partial, self._rider.prompts)


def _check(config: ServingConfig, out: Path | None, overwrite: bool) -> None:
    check_before(config, out or Path(f"{TRACE}.not-there"), overwrite)


def _write(
    recorder: Recorder,
    workload: Callable[[Trace], dict[str, Any]],
    parts: dict[str, Any],
    out: Path,
    overwrite: bool,
    partial: bool,
    prompts: Mapping[int, Sequence[int]],
    summary: Mapping[str, Any] | None = None,
) -> None:
    """Write a served run as any run, and beside it the trace of what was asked, to simulate it anew."""
    run = RunRecords(parts, recorder.tables(), partial=partial)
    requests = [
        replace(source, prompt_token_ids=prompts[source.id], hash_ids=None)  # whose hashes these were
        for source in recorded_requests(run)
    ]
    if not requests:
        print("no request came: no records are written")
        return
    trace = Trace(requests, {"source": "served"})
    run.manifest = {"workload": workload(trace)} | parts
    run.summary = summarize(run) | dict(summary or {})
    run.write(out, overwrite)
    write_trace(out / TRACE, trace)


def replay_run(trace: Trace, target: Target, progress: Progress) -> RunRecords:
    """Send a trace to a server, with a progress bar; returns what the client saw."""
    import uvloop

    from analysis.client.load_client import send_all
    from analysis.client.records import client_run

    with progress.bar("replay", len(trace.requests)) as show:
        start_ns, replies = uvloop.run(send_all(target, trace.requests, show))
    return client_run(trace, target, start_ns, replies)
