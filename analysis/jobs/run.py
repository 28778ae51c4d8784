"""The jobs behind the commands: make a trace, profile, simulate, run for real, compare.

The one place that builds executors and tokenizers; torch is imported only where one is built.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.cli.options import check_new
from analysis.comparison.ablation import ablate
from analysis.comparison.compare import compare
from analysis.comparison.policies import compare_policies
from analysis.comparison.targets import RUN_TARGETS, Targets
from analysis.jobs.determinism import check_deterministic
from analysis.jobs.machine_watch import MachineWatch
from analysis.jobs.options import Loading
from analysis.jobs.progress import Progress, following
from analysis.metrics.summary import summarize
from analysis.report.attribution_tables import attribution_sentence
from analysis.report.caveats import beyond_sentence
from analysis.report.comparison_page import write_report
from analysis.report.policy_page import write_policy_page
from engine.config import ServingConfig
from engine.prefix_hash import Content
from engine.records import manifest
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords, RunWriter, StoredTables, check_out
from engine.scheduler import load_scheduler
from engine.scheduler.registry import is_own
from sim.negative_controls import negative_controls
from sim.profile.format import Profile, check_profile_out, write_profile
from sim.profiling.calibration import calibrate, levels
from sim.profiling.drift import DriftCheck, check_same, drift_report
from sim.profiling.profiler import count_drift, count_work, measure_drift, measure_profile
from sim.simulate import predict, recorded_requests, refusals, replay_predicted
from traces.errors import TandemError, UnmetError
from traces.request import TraceRequest
from traces.sharegpt import LengthFilter, sample_requests, sharegpt_path
from traces.trace import Trace, atomic_file

if TYPE_CHECKING:
    from engine.executor.executor import Executor


def sharegpt_trace(
    model: str,
    count: int,
    seed: int,
    lengths: LengthFilter,
    progress: Progress,
    source: Path | None = None,
    max_tokens: int | None = None,
    strict: bool = False,
) -> Trace:
    """Sample real ShareGPT requests, counted with the model's tokenizer; all arrive at time 0.

    Raises:
        TandemError: no tokenizer at `model`, no data set, or too few requests within `lengths`.
    """
    from engine.executor.tokenizer import load_tokenizer, model_path

    path = model_path(model)
    with progress.status(f"reading the tokenizer of {path.name}"):
        tokenizer = load_tokenizer(path)
    with progress.status("reading ShareGPT"):
        return sample_requests(
            source or sharegpt_path(),
            tokenizer.encode,
            count,
            seed,
            tokenizer_name=path.name,
            lengths=lengths,
            max_tokens=max_tokens,
            strict=strict,
        )


def load_executor(loading: Loading, progress: Progress) -> Executor:
    """Load a model; errors are those of `engine.executor.executor.Executor`."""
    from engine.executor.executor import Executor

    with progress.status(f"loading {loading.model}"):
        return Executor(**asdict(loading))


def measure(
    executor: Executor, config: ServingConfig, out: Path, progress: Progress, overwrite: bool = False
) -> Profile:
    """Profile the executor and write the profile to `out`, with a progress bar.

    Where steps are captured, a run is served besides, which calibrates the profile: it stays beside `out`, as
    `out`.served. What ends it early loses nothing: measurements are kept there too, and the next call goes on from
    there. A profile that is there already is refused, unless `overwrite` is set.
    """
    notes, served = (out.with_name(f"{out.name}.{kept}") for kept in ("partial.jsonl", "served"))
    check_profile_out(out, overwrite)
    overwrite_served = overwrite or notes.exists()
    check_before(config, served, overwrite_served)
    with progress.bar("profile", count_work(executor, config)) as show:
        profile = measure_profile(executor, config, show, notes)
    if executor.captures:
        run = real_run(levels(profile, config), executor, config, served, progress, overwrite=overwrite_served)
        profile = calibrate(profile, [(run, config)])
    write_profile(profile, out, overwrite)
    notes.unlink(missing_ok=True)
    return profile


def drift_since(profile: Profile, executor: Executor, progress: Progress) -> dict[str, float]:
    """How far the machine has moved since it was profiled, with a progress bar."""
    with progress.bar("drift", count_drift(executor, profile)) as show:
        return measure_drift(executor, profile, show)


def check_drift(profile: Profile, executor: Executor, progress: Progress) -> dict[str, Any]:
    """Measure a sample of a profile's points again, with a progress bar; what is found, as `drift_report` says."""
    with progress.status("getting ready"):
        check = DriftCheck(executor, profile)
    with progress.bar("check", check.total) as show:
        found = check.run(show)
    return drift_report(executor, profile, found)


def check_before(config: ServingConfig, out: Path, overwrite: bool = False) -> None:
    """Raises TandemError now for what would otherwise come to light after minutes: a bad policy, a bad folder."""
    load_scheduler(config)
    check_out(out, overwrite)


def check_like(trace: Trace, like: RunRecords | None) -> None:
    """Raises TandemError if `like` is a run of another trace."""
    if like and like.manifest["workload"]["trace"] != trace.digest:
        raise TandemError("--like is a run of another trace than --trace: simulate the trace that it served")


def simulate_run(
    trace: Trace,
    profile: Profile,
    config: ServingConfig,
    out: Path,
    progress: Progress,
    like: RunRecords | None = None,
    what: str = "simulate",
    check: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> RunRecords:
    """Serve a trace in simulation and write the run to `out`.

    Args:
        trace: the workload.
        profile: the times.
        config: limits and policy.
        out: the run's folder.
        progress: where progress is shown.
        like: a real run of the trace: requests stop where they stopped there, and are refused as they were there.
        what: the progress bar's label.
        check: whether `engine.checks.step_checker` looks at every step, and all of them are planned again elsewhere.
        strict: whether nothing may be extrapolated beyond the profile.
        overwrite: whether a run in `out` is replaced.
        facts: what else the manifest's provenance should say.

    Raises:
        TandemError: `like` is a run of another trace, `out` holds a run, or a policy is at fault.
        UnmetError: `strict` is set, and something was; nothing is written.
    """
    check_like(trace, like)
    check_before(config, out, overwrite)
    _note_useless_cache(trace, config, progress)
    stop_rule = like.manifest["workload"]["stop_rule"] if like else "trace"
    requests = _stopping_like(trace, like) if like else trace.requests
    parts = {
        "workload": manifest.workload(trace, profile.model, profile.meta["dtype"], stop_rule),
        "system": manifest.system(profile.meta["device"], config),
        "provenance": manifest.provenance(
            backend="simulator", profile=profile.name, source=profile.meta["source"], **facts or {}
        ),
    }
    with RunWriter(out, overwrite) as writer:
        recorder = Recorder(writer.add)
        with following(progress, what, recorder, len(requests)):
            refused = refusals(like) if like else None
            coverage = predict(requests, config, profile, recorder, check=check, refused=refused)
        if strict:
            _check_covered(coverage, config.scheduler)
        recorder.close()
        written = writer.written()
        plan_again(written.folder, parts["system"], check, progress)
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
    """The requests of a run of the trace, which may have been cut short, as it recorded them; their prompts are the
    trace's, since a run without prefix caching does not record what they share."""
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


def simulate_policies(
    trace: Trace,
    profile: Profile,
    config: ServingConfig,
    policies: Sequence[str],
    out: Path,
    progress: Progress,
    like: RunRecords | None = None,
    check: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Serve a trace in simulation under several policies, and set them side by side.

    Args:
        policies: others are compared to the first. The rest as in `simulate_run`; `config` gives the limits.

    Returns:
        The comparison (`analysis.comparison.policies.compare_policies`), also written to `out` as policies.json, with
        policies.html and a folder for each policy beside it.

    Raises:
        TandemError: a policy or a folder is bad, before anything is simulated; or as `simulate_run`.
        UnmetError: as `simulate_run`; policies before the one that was refused keep their folders.
    """
    configs = check_policies(config, policies, out, overwrite)
    width = max(map(len, configs))
    rules: dict[str, Any] = {"check": check, "strict": strict, "overwrite": overwrite, "facts": facts}
    runs = {
        policy: simulate_run(
            trace, profile, each, out / _folder_name(policy), progress, like, policy.ljust(width), **rules
        )
        for policy, each in configs.items()
    }
    comparison = compare_policies(runs)
    write_json(out / "policies.json", comparison)
    title = f"{len(runs)} policies, {len(trace.requests):,} requests on {profile.name}"
    write_policy_page(comparison, runs, out / "policies.html", title)
    return comparison


def check_policies(
    config: ServingConfig, policies: Sequence[str], out: Path, overwrite: bool
) -> dict[str, ServingConfig]:
    """The config of each policy. Raises TandemError if one is bad, or `out` holds what may not be overwritten."""
    configs = {policy: replace(config, scheduler=policy) for policy in dict.fromkeys(policies)}
    folders = {policy: out / _folder_name(policy) for policy in configs}
    if len(set(folders.values())) < len(folders):
        raise TandemError(f"two of {', '.join(folders)} would be written to one folder: call a file otherwise")
    if (out / "manifest.json").exists():
        raise TandemError(f"{out} is a run: choose another --out, for a folder of runs")
    check_new(out / "policies.json", overwrite)
    for policy, each in configs.items():
        check_before(each, folders[policy], overwrite)
    return configs


def _folder_name(policy: str) -> str:
    """Of one folder, even if a policy is given by the path of its file."""
    return policy.replace(":", "-").replace("/", "-").lstrip(".-")


def real_run(
    trace: Trace,
    executor: Executor,
    config: ServingConfig,
    out: Path,
    progress: Progress,
    stop_rule: str = "trace",
    check: bool = False,
    overwrite: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> RunRecords:
    """Serve a trace on the executor and write the run to `out`; the last three as in `simulate_run`.

    Whatever ends it early (Ctrl-C, a failing data plane) is raised once the records so far are written, marked partial.
    """
    check_before(config, out, overwrite)
    _note_useless_cache(trace, config, progress)
    with progress.status("getting ready"):
        executor.prepare(config)
    recorder, failure, machine = Recorder(), None, MachineWatch()
    with following(progress, "run", recorder, len(trace.requests)):
        try:
            executor.serve(trace.requests, config, recorder, stop_rule, check)
        except BaseException as error:  # whatever it was, the records so far are worth keeping
            failure = error
    seen = machine.seen()
    parts = {
        "workload": manifest.workload(trace, executor.model, executor.dtype, stop_rule),
        "system": manifest.system(executor.device, config),
        "provenance": manifest.provenance(backend="executor", kernels=executor.kernels, machine=seen, **facts or {}),
    }
    run = RunRecords(parts, recorder.tables(), partial=failure is not None)
    run.summary = summarize(run)
    run.write(out, overwrite)
    if failure:
        progress.note(f"{out}: what ran until then is written, marked partial")
        raise failure
    plan_again(out, parts["system"], check, progress)
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


def compare_runs(
    sim: RunRecords,
    real: RunRecords,
    repeats: Sequence[RunRecords],
    profile: Profile,
    out: Path,
    progress: Progress,
    allow_different: Collection[str] = (),
    drift: Mapping[str, float] | None = None,
    terms: Sequence[str] = (),
    targets: Targets = RUN_TARGETS,
) -> dict[str, Any]:
    """Replay the real run's times through the simulator, and set the two runs side by side.

    Args:
        terms: of `analysis.comparison.ablation.TERMS`, to leave out one by one. The rest as in `compare`.

    Returns:
        The comparison, also written to `out` as compare.json, with report.html beside it.
    """
    config = manifest.config_of(real.manifest)
    changed = manifest.changed_sources(real.manifest)
    if changed:
        note = f"note: {', '.join(changed)} changed since the real run was recorded: its replay plans with today's"
        progress.note(note)
    replayed, parts, coverage = replay_predicted(real, config, profile)
    known: dict[str, Any] = {"drift": drift, "parts": parts, "coverage": coverage}
    comparison = compare(sim, real, replayed, repeats, allow_different, targets=targets, **known)
    if comparison["attribution"]:
        comparison["attribution"]["sentence"] = attribution_sentence(comparison["attribution"])
    comparison["decisions"] |= {"changed_sources": changed, "negative_controls": negative_controls(real, config)}
    if terms:
        with progress.bar("ablate", len(terms) + 1) as show:
            comparison["ablation"] = ablate(real, profile, terms, show)
    write_json(out / "compare.json", comparison)
    title = f"{config.scheduler} at depth {config.pipeline_depth}: simulated and real"
    write_report(comparison, sim, real, replayed, out / "report.html", title=title)
    return comparison


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file, and its folder if there is none. Raises TandemError if that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TandemError(f"cannot write {path}: {error.strerror or error}; nothing was written") from error
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=2).encode())


def check_profile(profile: Profile, executor: Executor, config: ServingConfig) -> None:
    """Raises TandemError if a profile is of another model, machine or dtype, or was measured for smaller batches."""
    check_same(profile, executor, ("device", "dtype", "model shape"))
    for limit, measured in profile.meta.get("limits", {}).items():
        wanted = getattr(config, limit)
        if limit in ("max_seqs", "max_batched_tokens", "max_model_len") and measured < wanted:
            raise TandemError(f"the profile was measured for a {limit} of {measured}, not {wanted}")
