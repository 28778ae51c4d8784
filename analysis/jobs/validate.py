"""The whole job in one command: trace, profile, simulate, run for real, compare."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from analysis.comparison.compare import is_met
from analysis.jobs.compare import compare_runs
from analysis.jobs.files import check_new
from analysis.jobs.limits import real_limits
from analysis.jobs.options import Limits, Loading, RunOptions
from analysis.jobs.profile import check_profile, drift_since, measure
from analysis.jobs.progress import Progress
from analysis.jobs.run import load_executor, load_within, real_run, simulate_run
from analysis.jobs.trace import sharegpt_trace
from analysis.report.comparison_page import print_comparison
from engine.config import ServingConfig
from engine.records.run_folder import check_out
from engine.scheduler import POLICIES
from sim.profile.format import Profile, read_profile
from traces.arrivals import assign_arrivals
from traces.errors import TandemError
from traces.sharegpt import LengthFilter
from traces.trace import Trace, write_trace

if TYPE_CHECKING:
    from engine.executor.executor import Executor

SCARCE = 1.5  # the matrix has KV blocks for so many of the longest requests, so that policies must preempt
MATRIX_SPEEDUP = 4.0  # and requests arrive so much faster,
MATRIX_SHARE = 3  # and are so many times fewer than in a single validation
TRACE, STOPS = "trace.parquet", "stops"  # a file, and the folder of the run that the model's own stops end
OPEN_ENDED = 256  # where the model decides when to stop, it may make so many tokens


@dataclass(frozen=True, slots=True)
class Job:
    """What to validate, and where to put it."""

    out: Path
    loading: Loading
    requests: int
    rate: float
    seed: int
    max_total: int
    repeats: int
    limits: Limits
    overwrite: bool

    def check_new(self, runs: Iterable[str]) -> None:
        """Raises TandemError if its trace or one of `runs` would replace what is to stay."""
        check_new(self.out / TRACE, self.overwrite)
        for run in runs:
            check_out(self.out / run, self.overwrite)


def validate_one(job: Job, progress: Progress) -> int:
    """Run the job; returns the exit status: 0, or 1 where decisions differ or an error is outside."""
    names = ("real", *(f"repeat-{number}" for number in range(1, job.repeats + 1)))
    job.check_new(("sim", *names))
    executor, settled = load_within(job.loading, job.limits, progress)
    trace = _trace(job, progress)
    profile = _profile(job, executor, settled.config, progress)
    options = RunOptions(overwrite=job.overwrite, facts=settled.facts)
    # Before the real run: it is a prediction.
    sim = simulate_run(trace, profile, settled.config, job.out / "sim", progress, options=options)
    real, *repeats = [real_run(trace, executor, settled.config, job.out / name, progress, options) for name in names]
    drift = drift_since(profile, executor, progress)
    comparison = compare_runs(sim, real, repeats, profile, job.out, progress, drift=drift)
    print_comparison(comparison, Console())
    progress.note(f"report: {job.out / 'report.html'}")
    return 0 if is_met(comparison) else 1


def validate_matrix(job: Job, progress: Progress) -> int:
    """Compare decisions for every policy at both depths under memory pressure, and with the model's own stops.

    Returns:
        The exit status: 0, or 1 where decisions differ anywhere or a falsified run goes unnoticed.
    """
    job = replace(job, rate=job.rate * MATRIX_SPEEDUP, requests=max(job.requests // MATRIX_SHARE, 2))
    cells = {f"{policy}-depth{depth}": (policy, depth) for policy, depth in product(sorted(POLICIES), (1, 2))}
    job.check_new(f"{cell}/{rider}" for cell in (*cells, STOPS) for rider in ("real", "sim"))
    executor = load_executor(job.loading, progress)
    config = _scarce(real_limits(executor, job.limits).config, job.max_total)
    trace = _trace(job, progress)
    profile = _profile(job, executor, config, progress)
    rows = []
    for name, (policy, depth) in cells.items():
        cell = replace(config, scheduler=policy, pipeline_depth=depth)
        rows.append(_cell(job, name, trace, executor, profile, cell, "trace", progress))
    open_ended = _open_ended(trace, job.max_total)
    cell = replace(config, scheduler="chunked_prefill", pipeline_depth=2)
    rows.append(_cell(job, STOPS, open_ended, executor, profile, cell, "model", progress))
    _print_matrix(rows)
    return 0 if all(row["identical"] and row["controls"] for row in rows) else 1


def _scarce(config: ServingConfig, max_total: int) -> ServingConfig:
    blocks = int(SCARCE * max_total) // config.block_size
    return replace(config, num_blocks=blocks, max_batched_tokens=max(config.max_batched_tokens, max_total))


def _cell(
    job: Job,
    name: str,
    trace: Trace,
    executor: Executor,
    profile: Profile,
    config: ServingConfig,
    stop_rule: str,
    progress: Progress,
) -> dict[str, Any]:
    out, options = job.out / name, RunOptions(stop_rule, overwrite=job.overwrite)
    progress.note(f"{name}:")
    real = real_run(trace, executor, config, out / "real", progress, options)
    sim = simulate_run(trace, profile, config, out / "sim", progress, real, options)
    decisions = compare_runs(sim, real, (), profile, out, progress)["decisions"]
    return {
        "run": name,
        "steps": decisions["steps"],
        "preemptions": real.summary["preemptions"],
        "stopped": real.tables["requests"]["outcome"].to_pylist().count("stop"),
        "identical": decisions["identical"],
        "controls": all(noticed is not False for noticed in decisions["negative_controls"].values()),
    }


def _print_matrix(rows: list[dict[str, Any]]) -> None:
    title = "Decisions: each real run against its replay in the simulator"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(("yes" if value else "NO") if isinstance(value, bool) else str(value) for value in row.values())
        )
    Console().print(table)


def _trace(job: Job, progress: Progress) -> Trace:
    lengths = LengthFilter(max_total=job.max_total)
    trace = sharegpt_trace(job.loading.model, job.requests, job.seed, progress, lengths=lengths)
    for note in trace.notes:
        progress.note(f"note: {note}")
    trace = assign_arrivals(trace, "poisson", rate=job.rate, seed=job.seed)
    job.out.mkdir(parents=True, exist_ok=True)
    write_trace(job.out / TRACE, trace)
    return trace


def _open_ended(trace: Trace, max_total: int) -> Trace:
    """The same requests, each allowed to go on until the model stops, within `OPEN_ENDED` and `max_total`."""
    limits = [min(OPEN_ENDED, max_total - each.prompt_len) for each in trace.requests]
    pairs = zip(trace.requests, limits, strict=True)
    return replace(trace, requests=[replace(each, max_tokens=limit, output_len=limit) for each, limit in pairs])


def _profile(job: Job, executor: Executor, config: ServingConfig, progress: Progress) -> Profile:
    """The profile of an earlier run, if it is of this model and machine and wide enough; else a new one."""
    folder = job.out / "profile"
    if folder.exists():
        try:
            profile = read_profile(folder)
            check_profile(profile, executor, config)
        except TandemError as error:
            progress.note(f"note: {folder}: {error}; measuring a new one")
        else:
            progress.note(f"{folder}: reused")
            return profile
    return measure(executor, config, folder, progress, job.overwrite)
