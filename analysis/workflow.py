"""The jobs behind the commands: make a trace, profile, simulate, run for real, compare.

The one place that builds executors and tokenizers; torch is imported only where one is built.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from analysis.compare import compare
from analysis.metrics import metrics
from engine import manifest
from engine.config import ServingConfig
from engine.model_config import ModelConfig
from engine.recorder import Recorder
from engine.records import RunRecords
from sim.profile import Profile
from sim.simulate import predict, recorded_requests, replay
from traces.errors import TandemError
from traces.format import Trace

if TYPE_CHECKING:
    from engine.executor.executor import Executor

REFRESH_S = 0.5


class Interrupted(Exception):
    """A real run ended early; `records` holds what it did until then, marked partial."""

    def __init__(self, records: RunRecords) -> None:
        super().__init__("the run was interrupted")
        self.records = records


@contextmanager
def progress_bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on `console`; yields the function that says how far things are."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, refresh_per_second=2) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
        progress.update(task, completed=total)


@contextmanager
def watched(console: Console, what: str, recorder: Recorder, total: int) -> Iterator[None]:
    """A bar that follows a recorder from a thread of its own, so that the serving loop need not."""
    over = Event()
    with progress_bar(console, what, total) as show:

        def follow() -> None:
            while not over.wait(REFRESH_S):
                show(recorder.ended)

        thread = Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def simulate_run(
    trace: Trace,
    profile: Profile,
    config: ServingConfig,
    console: Console,
    stop_rule: str = "trace",
    stops_of: RunRecords | None = None,
) -> RunRecords:
    """Serve a trace in simulation.

    Args:
        stops_of: a real run of the trace: requests stop where they stopped there.

    Raises:
        TandemError: `stops_of` is a run of another trace.
    """
    if stops_of and stops_of.manifest["workload"]["trace"] != trace.digest:
        raise TandemError("the run given as --like served another trace; give its own trace with --trace")
    requests = recorded_requests(stops_of) if stops_of else trace.requests
    recorder = Recorder()
    with watched(console, "simulate", recorder, len(requests)):
        coverage = predict(requests, config, profile, recorder)
    parts = {
        "workload": manifest.workload(trace, _model_of(profile), profile.meta["dtype"], stop_rule),
        "system": manifest.system(profile.meta["device"], config),
        "provenance": manifest.provenance(backend="simulator", profile=profile.name, source=profile.meta["source"]),
    }
    run = RunRecords(parts, recorder.tables())
    run.summary = metrics(run) | {"profile_lookups": coverage}
    return run


def _model_of(profile: Profile) -> ModelConfig:
    return ModelConfig.from_dict(profile.meta["model"])


def real_run(
    trace: Trace, executor: Executor, config: ServingConfig, console: Console, stop_rule: str = "trace"
) -> RunRecords:
    """Serve a trace on the executor.

    Raises:
        Interrupted: Ctrl-C, or the data plane failed; what was recorded until then comes with it.
    """
    recorder, failure = Recorder(), None
    with watched(console, "run", recorder, len(trace.requests)):
        try:
            executor.serve(trace.requests, config, recorder, stop_rule)
        except BaseException as error:  # whatever it was, the records so far are worth keeping
            failure = error
    parts = {
        "workload": manifest.workload(trace, executor.model, executor.dtype, stop_rule),
        "system": manifest.system(executor.device, config),
        "provenance": manifest.provenance(backend="executor", kernels=executor.kernels),
    }
    run = RunRecords(parts, recorder.tables(), partial=failure is not None)
    run.summary = metrics(run)
    if failure:
        raise Interrupted(run) from failure
    return run


def compare_runs(
    sim: RunRecords,
    real: RunRecords,
    repeats: Sequence[RunRecords],
    profile: Profile,
    allow_different: Collection[str] = (),
) -> dict[str, Any]:
    """Replay the real run's times through the simulator, and set the two runs side by side."""
    replayed = replay(real, manifest.config_of(real.manifest), profile)
    return compare(sim, real, replayed, repeats, allow_different)


def check_profile(profile: Profile, model: ModelConfig, device: str, dtype: str) -> None:
    """Raises TandemError if a profile is of another model, device or dtype."""
    measured = _model_of(profile)
    for what, has, wanted in (
        ("device", profile.meta["device"], device),
        ("dtype", profile.meta["dtype"], dtype),
        ("model shape", replace(measured, name=""), replace(model, name="")),
    ):
        if has != wanted:
            raise TandemError(
                f"the profile is of another {what} ({has}, not {wanted}): measure one with tandem profile"
            )


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user said of a run's limits; None is 'not said'."""

    scheduler: str | None = None
    pipeline_depth: int | None = None
    num_blocks: int | None = None
    block_size: int | None = None
    max_seqs: int | None = None
    max_batched_tokens: int | None = None
    max_model_len: int | None = None

    def said(self) -> dict[str, Any]:
        """The limits that were given."""
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}
