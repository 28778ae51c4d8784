"""`tandem serve`: builds the engine driver that the server is handed, and keeps the run's records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.jobs.limits import Settled, config_to_check, simulated_limits
from analysis.jobs.machine_watch import MachineWatch
from analysis.jobs.options import Limits, Loading
from analysis.jobs.progress import Progress, Silent
from analysis.jobs.run import check_before, load_within, of_executor, of_simulator
from analysis.metrics.summary import summarize
from engine.records import manifest
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from sim.profile.format import Profile, find_profile, read_profile
from sim.realtime import RealtimeDriver
from sim.replay import recorded_requests
from traces.synthetic import draw_length
from traces.trace import Trace, write_trace

if TYPE_CHECKING:
    from engine.server.executor_driver import ExecutorDriver

TRACE = "trace.parquet"


@dataclass(kw_only=True)
class _Service:
    """Implements the part of `engine.server.driver.Service` that both backends share.

    Attributes:
        out: where the records go, or None.
        overwrite: whether a run there is replaced.
        progress: makes a `Progress` in whichever process needs one.
    """

    out: Path | None = None
    overwrite: bool = False
    progress: Callable[[], Progress] = Silent
    _driver: RealtimeDriver | ExecutorDriver = field(init=False)

    @property
    def records(self) -> bool:
        """As in `Service`."""
        return self.out is not None

    def _keep(self, recorder: Recorder, partial: bool, summary: dict[str, Any], **facts: Any) -> None:
        """Write a served run as any run, and beside it the trace of what was asked, to simulate it anew."""
        assert self.out
        run = RunRecords({}, recorder.tables(), partial=partial)
        requests = [
            replace(source, prompt_token_ids=self._driver.prompts[source.id], hash_ids=None)  # whose hashes these were
            for source in recorded_requests(run)
        ]
        if not requests:
            print("no request came: no records are written")
            return
        trace = Trace(requests, {"source": "served"})
        run.manifest = manifest.compose(trace=trace, config=self._driver.config, **facts)
        run.summary = summarize(run) | summary
        run.write(self.out, self.overwrite)
        write_trace(self.out / TRACE, trace)


@dataclass
class SimService(_Service):
    """Implements `engine.server.driver.Service` with the simulator.

    Attributes:
        profile: the latency profile's folder.
        limits: as the user said.
        filler: token ids that outputs repeat.
        vocab_size: of the tokenizer they are from.
        output: a distribution of output lengths, or None: requests run to their `max_tokens`.
        seed: of the lengths.
    """

    profile: Path
    limits: Limits
    filler: Sequence[int]
    vocab_size: int
    output: str | None = None
    seed: int = 0
    _driver: RealtimeDriver = field(init=False)

    def check(self) -> None:
        """Raises TandemError now for what would otherwise come to light in another process; says the limits."""
        _, settled = self._settled_limits()
        check_before(settled.config, self.out, self.overwrite)
        if self.output is not None:
            draw_length(self.output, self.seed, 0)
        settled.say(self.progress())

    def _settled_limits(self) -> tuple[Profile, Settled]:
        profile = read_profile(find_profile(self.profile))
        return profile, simulated_limits(profile, self.limits)

    def open(self) -> RealtimeDriver:
        """As in `Service`."""
        profile, settled = self._settled_limits()
        draw = None if self.output is None else partial(draw_length, self.output, self.seed)
        self._driver = RealtimeDriver(profile, settled.config, self.filler, self.vocab_size, draw, self.records)
        self._facts = of_simulator(profile) | settled.facts
        return self._driver

    def keep(self, recorder: Recorder, start_ns: int, partial: bool) -> None:
        """As in `Service`."""
        lag = {"pacing_lag_ms": self._driver.lag_ns / 1e6}
        self._keep(recorder, partial, lag, start_perf_ns=start_ns, **self._facts)


@dataclass
class RealService(_Service):
    """Implements `engine.server.driver.Service` with the executor.

    Attributes:
        loading: the model.
        limits: as the user said.
    """

    loading: Loading
    limits: Limits

    def check(self) -> None:
        """As in `SimService`."""
        check_before(config_to_check(self.limits), self.out, self.overwrite)

    def open(self) -> ExecutorDriver:
        """As in `Service`."""
        from engine.server.executor_driver import ExecutorDriver

        executor, settled = load_within(self.loading, self.limits, self.progress())
        self._driver = ExecutorDriver(executor, settled.config, self.records)
        self._facts = {"stop_rule": "model"} | of_executor(executor) | settled.facts
        self._machine = MachineWatch()
        return self._driver

    def keep(self, recorder: Recorder, start_ns: int, partial: bool) -> None:
        """As in `Service`."""
        self._keep(recorder, partial, {}, **self._facts, start_perf_ns=start_ns, machine=self._machine.seen())
