"""Serve a trace: in simulation, or for real. Only jobs build executors; torch is imported where one is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.jobs.determinism import check_deterministic
from analysis.jobs.limits import Settled, real_limits
from analysis.jobs.machine_watch import MachineWatch
from analysis.jobs.options import AS_USUAL, Limits, Loading, RunOptions
from analysis.jobs.progress import Progress, following
from analysis.metrics.summary import summarize
from analysis.report.caveats import beyond_sentence
from engine.config import ServingConfig
from engine.prefix_hash import Content
from engine.records import manifest
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords, RunWriter, StoredTables, check_out
from engine.scheduler.registry import check_scheduler, is_own
from sim.profile.format import Profile
from sim.replay import recorded_requests, refusals
from sim.simulate import predict
from traces.errors import TandemError, UnmetError
from traces.request import TraceRequest
from traces.trace import Trace

if TYPE_CHECKING:
    from engine.executor.executor import Executor


def load_executor(loading: Loading, progress: Progress) -> Executor:
    """Load a model; errors are those of `engine.executor.executor.Executor`."""
    from engine.executor.executor import Executor

    with progress.status(f"loading {loading.model}"):
        return Executor(**asdict(loading))


def load_within(loading: Loading, limits: Limits, progress: Progress) -> tuple[Executor, Settled]:
    """Load a model, and settle and say the limits. Raises TandemError as `load_executor` and `real_limits`."""
    executor = load_executor(loading, progress)
    settled = real_limits(executor, limits)
    settled.say(progress)
    return executor, settled


def of_executor(executor: Executor) -> dict[str, Any]:
    """Keywords of `engine.records.manifest.compose`."""
    names = ("model", "dtype", "device", "kernels")
    return {"backend": "executor"} | {name: getattr(executor, name) for name in names}


def of_simulator(profile: Profile) -> dict[str, Any]:
    """Keywords of `engine.records.manifest.compose`."""
    names = ("dtype", "device", "source")
    of_profile = {"backend": "simulator", "model": profile.model, "profile": profile.name}
    return of_profile | {name: getattr(profile.meta, name) for name in names}


def check_before(config: ServingConfig, out: Path | None = None, overwrite: bool = False) -> None:
    """Raises TandemError now for a bad policy or folder, and not after minutes."""
    check_scheduler(config)
    if out:
        check_out(out, overwrite)


def check_like(trace: Trace, like: RunRecords | None) -> None:
    """Raises TandemError if `like` is a run of another trace."""
    if like and like.manifest["workload"]["trace"] != trace.digest:
        raise TandemError("--like is a run of another trace than --trace: simulate the trace that it served")


def simulate_run(
    trace: Trace, profile: Profile, config: ServingConfig, out: Path, progress: Progress, options: RunOptions = AS_USUAL
) -> RunRecords:
    """Serve a trace in simulation and write the run to `out`.

    Args:
        trace: the workload.
        profile: the times.
        config: limits and policy.
        out: the run's folder.
        progress: where progress is shown.
        options: all but the stop rule, which is that of `options.like`.

    Raises:
        TandemError: `options.like` is a run of another trace, `out` holds a run, or a policy is at fault.
        UnmetError: the run is strict, and something was extrapolated; nothing is written.
    """
    like = options.like
    check_like(trace, like)
    check_before(config, out, options.overwrite)
    _note_useless_cache(trace, config, progress)
    stop_rule = like.manifest["workload"]["stop_rule"] if like else "trace"
    requests = _stopping_like(trace, like) if like else trace.requests
    backend = of_simulator(profile)
    parts = manifest.compose(trace=trace, config=config, stop_rule=stop_rule, **backend, **options.facts)
    with RunWriter(out, options.overwrite) as writer:
        recorder = Recorder(writer.add)
        with following(progress, options.label, recorder, len(requests)):
            refused = refusals(like) if like else None
            coverage = predict(requests, config, profile, recorder, check=options.check, refused=refused)
        if options.strict:
            _check_covered(coverage, config.scheduler)
        recorder.close()
        written = writer.written()
        plan_again(written.folder, parts["system"], options.check, progress)
        summary = summarize(RunRecords(parts, written))
        run = RunRecords(parts, StoredTables(out), summary | {"profile_lookups": coverage})
        writer.finish(run)
    return run


def _check_covered(coverage: Mapping[str, Any], policy: str) -> None:
    if beyond := beyond_sentence(coverage):
        raise UnmetError(
            f"--strict, {policy}: {beyond[0].lower()}{beyond[1:-1]}; profile the machine with limits that hold these, "
            "simulate with lower ones, or leave out --strict; nothing was kept"
        )


def _stopping_like(trace: Trace, like: RunRecords) -> list[TraceRequest]:
    """The recorded requests of a run, with the trace's prompts: the run may not have recorded what prompts share."""
    prompts = ("prompt_token_ids", "hash_ids", "hash_block_size")
    return [
        replace(each, **{name: getattr(trace.requests[each.id], name) for name in prompts})
        for each in recorded_requests(like)
    ]


def _note_useless_cache(trace: Trace, config: ServingConfig, progress: Progress) -> None:
    if config.prefix_caching and all(Content.of(each) is None for each in trace.requests):
        progress.note(
            "note: the trace says nothing of what prompts share (no token ids, no hash ids): nothing is cached"
        )


def real_run(
    trace: Trace, executor: Executor, config: ServingConfig, out: Path, progress: Progress, options: RunOptions
) -> RunRecords:
    """Serve a trace on the executor and write the run to `out`; arguments as in `simulate_run`.

    Whatever ends it early (Ctrl-C, a failing data plane) is raised once the records so far are written, marked partial.
    """
    check_before(config, out, options.overwrite)
    _note_useless_cache(trace, config, progress)
    with progress.status("getting ready"):
        executor.prepare(config)
    recorder, failure, machine = Recorder(), None, MachineWatch()
    with following(progress, "run", recorder, len(trace.requests)):
        try:
            executor.serve(trace.requests, config, recorder, options.stop_rule, options.check)
        except BaseException as error:  # whatever it was, the records so far are worth keeping
            failure = error
    facts = {"machine": machine.seen(), **options.facts}
    parts = manifest.compose(trace=trace, config=config, stop_rule=options.stop_rule, **of_executor(executor), **facts)
    run = RunRecords(parts, recorder.tables(), partial=failure is not None)
    run.summary = summarize(run)
    run.write(out, options.overwrite)
    if failure:
        progress.note(f"{out}: what ran until then is written, marked partial")
        raise failure
    plan_again(out, parts["system"], options.check, progress)
    return run


def plan_again(folder: Path, system: Mapping[str, Any], check: bool, progress: Progress) -> None:
    """See whether a policy is deterministic, by the run in `folder`: of one's own its opening, if `check` all of any.

    Raises:
        TandemError: as `analysis.jobs.determinism.check_deterministic`.
    """
    if check or is_own(system["scheduler"]):
        with progress.status("planning again"):
            unknown = check_deterministic(folder, system, whole=check)
        if unknown:
            progress.note(f"note: {unknown}")
