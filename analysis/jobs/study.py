"""How far simulation can be believed on a machine: one profile, real runs and repeats, simulations, comparisons.

A study has many cases: several loads and policies. Its first half, `measure_study`, needs the machine: it profiles the
machine, finds its capacity, and serves every case for real, but for the runs that its folder holds already. The second,
`judge_study`, needs the folder alone: it simulates, replays, compares and ranks.

    STUDY/profile, drift.json, capacity/, POLICY-LOAD/{trace.parquet, real, repeat-1, …, sim, compare.json, report.html}

A validation is a study with one case, whose simulation comes before the real run.

    OUT/profile, {trace.parquet, sim, real, repeat-1, …, compare.json, report.html}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.comparison.targets import STUDY_TARGETS, Drift, Targets, judge_case
from analysis.jobs.compare import compare_runs, rank_runs
from analysis.jobs.files import check_new, sharegpt_trace, write_json
from analysis.jobs.limits import real_limits
from analysis.jobs.options import Comparing, Limits, Loading, RunOptions, Validation
from analysis.jobs.profile import check_profile, drift_since, measure
from analysis.jobs.progress import Progress
from analysis.jobs.run import check_before, load_executor, load_within, real_run, simulate_run
from engine.config import ServingConfig
from engine.records import manifest
from engine.records.run_folder import RunRecords, check_out, read_run
from engine.scheduler import POLICIES
from sim.profile.format import Profile, read_profile
from traces.arrivals import assign_arrivals
from traces.errors import TandemError
from traces.sharegpt import LengthFilter
from traces.trace import Trace, read_trace, write_trace

if TYPE_CHECKING:
    from engine.executor.executor import Executor

TRACE = "trace.parquet"
BURST = 2000  # requests at once, whose throughput is the capacity
SCARCE = 1.5  # the matrix has KV blocks for so many of the longest requests, so that policies must preempt
MATRIX_SPEEDUP = 4.0  # and requests arrive so much faster,
MATRIX_SHARE = 3  # and are so many times fewer than in a single validation
STOPS = "stops"  # the folder of the run that the model's own stops end
OPEN_ENDED = 256  # where the model decides when to stop, it may make so many tokens


# -- one case --------------------------------------------------------------------------------------------------


def keep_trace(trace: Trace, folder: Path) -> None:
    """Write a case's trace."""
    folder.mkdir(parents=True, exist_ok=True)
    write_trace(folder / TRACE, trace)


def profile_in(
    folder: Path, executor: Executor, config: ServingConfig, progress: Progress, renew: bool, overwrite: bool = False
) -> Profile:
    """The profile of an earlier session, if it is of this model and machine and wide enough; else a new one.

    Raises:
        TandemError: the profile does not fit, and `renew` is not set.
    """
    if folder.exists():
        try:
            profile = read_profile(folder)
            check_profile(profile, executor, config)
        except TandemError as error:
            if not renew:
                raise
            progress.note(f"note: {folder}: {error}; measuring a new one")
        else:
            progress.note(f"{folder}: reused")
            return profile
    folder.parent.mkdir(parents=True, exist_ok=True)
    return measure(executor, config, folder, progress, overwrite)


def judge_runs(
    trace: Trace, runs: Sequence[RunRecords], profile: Profile, folder: Path, progress: Progress, drift: Drift = None
) -> dict[str, Any]:
    """Simulate the case that was served for real, and compare. The folder gets both, in place of earlier ones.

    Args:
        runs: the real run, and that run again, any number of times. The rest as in `compare_runs`.
    """
    config, options = manifest.config_of(runs[0].manifest), RunOptions(overwrite=True, like=runs[0])
    sim = simulate_run(trace, profile, config, folder / "sim", progress, options)
    return compare_runs([sim, *runs], profile, folder, progress, Comparing(), drift)


# -- a study ---------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A policy under a load, a share of the capacity."""

    policy: str
    load: float

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.policy}-{round(100 * self.load)}"


@dataclass(frozen=True, slots=True)
class Study:
    """What to serve.

    Attributes:
        trace: requests, whose arrivals are replaced.
        policy: that serves all `loads`, and as many requests at once as tell the capacity.
        against: policies that serve `shared` loads too.
        shared: loads at which policies are ranked, and real runs of `policy` repeated.
        repeats: further real runs there.
        seconds: how long requests arrive.
        seed: of the arrivals.
    """

    trace: Trace
    policy: str
    loads: Sequence[float]
    against: Sequence[str]
    shared: Sequence[float]
    repeats: int
    seconds: float
    seed: int

    @property
    def cases(self) -> list[Case]:
        """All of them, those that are ranked first."""
        ranked = [Case(policy, load) for load in self.shared for policy in (self.policy, *self.against)]
        return [*dict.fromkeys([*ranked, *(Case(self.policy, load) for load in self.loads)])]

    @property
    def runs(self) -> Iterator[tuple[Case, str]]:
        """Every real run, in order: the ranked cases, then repeats with other cases between them.

        So repeats differ by as much as the machine drifts in a session, as the runs of different policies do.
        """
        ranked = [case for case in self.cases if case.load in self.shared]
        others = [case for case in self.cases if case not in ranked]
        yield from ((case, "real") for case in ranked)
        rounds = max(1, self.repeats)
        for turn in range(rounds):
            yield from ((case, "real") for case in others[turn::rounds])
            if turn < self.repeats:
                yield from ((case, f"repeat-{turn + 1}") for case in ranked if case.policy == self.policy)

    def arrivals(self, load: float, capacity: float) -> Trace:
        """The trace's requests at a share of the capacity. Raises TandemError if the trace has too few."""
        rate = load * capacity
        count = round(rate * self.seconds)
        if not 1 <= count <= len(self.trace.requests):
            raise TandemError(
                f"{self.seconds:g} s at {rate:.1f} requests a second are {count:,} requests, "
                f"the trace has {len(self.trace.requests):,}: give a longer --trace, or fewer --seconds"
            )
        return assign_arrivals(_first(self.trace, count), "poisson", rate=rate, seed=self.seed)


def measure_study(study: Study, executor: Executor, config: ServingConfig, out: Path, progress: Progress) -> None:
    """Profile the machine and serve every case for real, but for what `out` holds already.

    Raises:
        TandemError: a policy or folder is bad, the trace is too short, or the machine cannot be profiled.
    """
    for case in study.cases:
        check_before(replace(config, scheduler=case.policy), out / case.name / "real", overwrite=True)
    profile = profile_in(out / "profile", executor, config, progress, renew=False)
    capacity = _capacity(study, executor, replace(config, scheduler=study.policy), out / "capacity", progress)
    progress.note(f"capacity: {capacity:.1f} requests a second")
    for case, name in study.runs:
        folder = out / case.name
        if not _is_whole(folder / name):
            trace = study.arrivals(case.load, capacity)
            keep_trace(trace, folder)
            progress.note(f"{case.name}/{name}:")
            of_case = replace(config, scheduler=case.policy)
            real_run(trace, executor, of_case, folder / name, progress, RunOptions(overwrite=True))
    if not (out / "drift.json").exists():
        write_json(out / "drift.json", drift_since(profile, executor, progress))


def _capacity(study: Study, executor: Executor, config: ServingConfig, folder: Path, progress: Progress) -> float:
    if not _is_whole(folder):
        progress.note("capacity:")
        burst = assign_arrivals(_first(study.trace, BURST), "all_at_once")
        real_run(burst, executor, config, folder, progress, RunOptions(overwrite=True))
    return float(read_run(folder).summary["request_throughput"])


def _first(trace: Trace, count: int) -> Trace:
    return replace(trace, requests=trace.requests[:count])


def _is_whole(folder: Path) -> bool:
    return (folder / "manifest.json").exists() and not read_run(folder).partial


def judge_study(out: Path, progress: Progress, targets: Targets = STUDY_TARGETS) -> dict[str, Any]:
    """Simulate and compare every case of a measured study, and rank the policies of each load.

    Returns:
        The content of `out`/fidelity.json: `cases` {name: {policy, load, requests, result}}, `rankings` {load:
        ranking}, `verdicts`: [{case, what, error, allowed, spread, within}], and the profile's held-out error and
        drift.

    Raises:
        TandemError: `out` holds no measured study.
    """
    found = sorted(path.parent for path in out.glob(f"*/{TRACE}"))
    if not found:
        raise TandemError(f"{out} holds no measured study: make one with tandem fidelity measure")
    profile = read_profile(out / "profile")
    drift = json.loads((out / "drift.json").read_text(encoding="utf-8")) if (out / "drift.json").exists() else None
    cases = {folder.name: _judged_case(folder, profile, progress, drift) for folder in found}
    loads = sorted({case["load"] for case in cases.values()})
    by_load = {load: [name for name, case in cases.items() if case["load"] == load] for load in loads}
    rankings = {load: _runs(out, names) for load, names in by_load.items() if len(names) > 1}
    verdicts = (judge_case(name, case["load"], case["result"], targets) for name, case in cases.items())
    study = {
        "profile": {name: getattr(profile.meta, name) for name in ("device", "dtype", "held_out")},
        "drift": drift,
        "cases": cases,
        "rankings": {f"{load:.0%}": rank_runs(runs) for load, runs in rankings.items()},
        "verdicts": [verdict for of_case in verdicts for verdict in of_case],
    }
    write_json(out / "fidelity.json", study)
    return study


def _judged_case(folder: Path, profile: Profile, progress: Progress, drift: Drift) -> dict[str, Any]:
    runs = [read_run(path) for path in (folder / "real", *sorted(folder.glob("repeat-*")))]
    result = judge_runs(read_trace(folder / TRACE), runs, profile, folder, progress, drift)
    policy, _, load = folder.name.rpartition("-")
    return {"policy": policy, "load": int(load) / 100, "requests": len(runs[0].tables["requests"]), "result": result}


def _runs(out: Path, names: Sequence[str]) -> dict[str, RunRecords]:
    folders = [path for name in names for path in sorted((out / name).iterdir()) if (path / "manifest.json").exists()]
    return {f"{path.parent.name}/{path.name}": read_run(path) for path in folders}


# -- a validation ----------------------------------------------------------------------------------------------


def validate(job: Validation, loading: Loading, limits: Limits, progress: Progress) -> dict[str, Any]:
    """Simulate, serve for real, and compare. Returns the comparison, as `compare_runs`."""
    names = ("real", *(f"repeat-{number}" for number in range(1, job.repeats + 1)))
    _check_new(job, ("sim", *names))
    executor, settled = load_within(loading, limits, progress)
    trace, config = _sampled(job, loading.model, progress), settled.config
    profile = profile_in(job.out / "profile", executor, config, progress, renew=True, overwrite=job.overwrite)
    options = RunOptions(overwrite=job.overwrite, facts=settled.facts)
    # Before the real run: it is a prediction.
    sim = simulate_run(trace, profile, config, job.out / "sim", progress, options)
    real = [real_run(trace, executor, config, job.out / name, progress, options) for name in names]
    drift = drift_since(profile, executor, progress)
    return compare_runs([sim, *real], profile, job.out, progress, Comparing(targets=job.targets), drift)


def _check_new(job: Validation, runs: Iterable[str]) -> None:
    """Raises TandemError if its trace or one of `runs` would replace what is to stay."""
    check_new(job.out / TRACE, job.overwrite)
    for run in runs:
        check_out(job.out / run, job.overwrite)


def _sampled(job: Validation, model: str, progress: Progress) -> Trace:
    """Sample the requests, and write them."""
    lengths = LengthFilter(max_total=job.max_total)
    trace = sharegpt_trace(model, job.requests, job.seed, progress, lengths=lengths)
    for note in trace.notes:
        progress.note(f"note: {note}")
    trace = assign_arrivals(trace, "poisson", rate=job.rate, seed=job.seed)
    keep_trace(trace, job.out)
    return trace


def validate_matrix(job: Validation, loading: Loading, limits: Limits, progress: Progress) -> list[dict[str, Any]]:
    """Compare decisions for every policy at both depths under memory pressure, and with the model's own stops.

    Returns:
        For each run {run, steps, preemptions, stopped, identical, controls}: whether its replay decided the same, and
        whether falsified times were noticed.
    """
    job = replace(job, rate=job.rate * MATRIX_SPEEDUP, requests=max(job.requests // MATRIX_SHARE, 2))
    cases = {f"{policy}-depth{depth}": (policy, depth) for policy, depth in product(sorted(POLICIES), (1, 2))}
    cases[STOPS] = "chunked_prefill", 2
    _check_new(job, (f"{case}/{run}" for case in cases for run in ("real", "sim")))
    executor = load_executor(loading, progress)
    config = _scarce(real_limits(executor, limits).config, job.max_total)
    trace = _sampled(job, loading.model, progress)
    profile = profile_in(job.out / "profile", executor, config, progress, renew=True, overwrite=job.overwrite)
    rows = []
    for name, (policy, depth) in cases.items():
        rule, requests = ("model", _open_ended(trace, job.max_total)) if name == STOPS else ("trace", trace)
        of_case, folder = replace(config, scheduler=policy, pipeline_depth=depth), job.out / name
        progress.note(f"{name}:")
        options = RunOptions(rule, overwrite=job.overwrite)
        real = real_run(requests, executor, of_case, folder / "real", progress, options)
        decisions = judge_runs(requests, [real], profile, folder, progress)["decisions"]
        rows.append({"run": name} | _row(real, decisions))
    return rows


def _row(real: RunRecords, decisions: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "steps": decisions["steps"],
        "preemptions": real.summary["preemptions"],
        "stopped": real.tables["requests"]["outcome"].to_pylist().count("stop"),
        "identical": decisions["identical"],
        "controls": all(noticed is not False for noticed in decisions["negative_controls"].values()),
    }


def _scarce(config: ServingConfig, max_total: int) -> ServingConfig:
    blocks = int(SCARCE * max_total) // config.block_size
    return replace(config, num_blocks=blocks, max_batched_tokens=max(config.max_batched_tokens, max_total))


def _open_ended(trace: Trace, max_total: int) -> Trace:
    """The same requests, each allowed to go on until the model stops, within `OPEN_ENDED` and `max_total`."""
    limits = [min(OPEN_ENDED, max_total - each.prompt_len) for each in trace.requests]
    pairs = zip(trace.requests, limits, strict=True)
    return replace(trace, requests=[replace(each, max_tokens=limit, output_len=limit) for each, limit in pairs])
