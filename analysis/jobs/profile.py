"""Measure a profile, and see whether an older one is still true."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.jobs.options import RunOptions
from analysis.jobs.progress import Progress
from analysis.jobs.run import check_before, real_run
from engine.config import ServingConfig
from sim.memory_model import MEMORY_LIMITS
from sim.profile.format import Profile, check_profile_out, write_profile
from sim.profiling.calibration import LOAD_S, LOADS, calibrate, calibration_load
from sim.profiling.drift import DriftCheck, check_same, count_drift, drift_report, measure_drift
from sim.profiling.profiler import count_work, estimate, measure_profile
from traces.errors import TandemError

if TYPE_CHECKING:
    from engine.executor.executor import Executor


def measure(
    executor: Executor, config: ServingConfig, out: Path, progress: Progress, overwrite: bool = False
) -> Profile:
    """Profile the executor and write the profile to `out`, with a progress bar.

    Where steps are captured, the executor serves a calibration load besides. That run stays beside `out`, as
    `out`.calibration. An interruption loses nothing: measurements are kept there too, and the next call goes on from
    them. A profile that is there already is refused, unless `overwrite` is set.
    """
    notes, calibration = (out.with_name(f"{out.name}.{kept}") for kept in ("partial.jsonl", "calibration"))
    check_profile_out(out, overwrite)
    options = RunOptions(overwrite=overwrite or notes.exists())
    check_before(config, calibration, options.overwrite)
    with progress.bar("profile", count_work(executor, config)) as show:
        profile = measure_profile(executor, config, show, notes)
    if executor.captures:
        run = real_run(calibration_load(profile, config), executor, config, calibration, progress, options)
        profile = calibrate(profile, [(run, config)])
    write_profile(profile, out, overwrite)
    notes.unlink(missing_ok=True)
    return profile


def plan_facts(executor: Executor, config: ServingConfig, progress: Progress) -> dict[str, Any]:
    """What would be measured, by table, and how long it takes: known from a few measurements."""
    with progress.status("timing a few measurements"):
        points, seconds = estimate(executor, config)
    seconds += len(LOADS) * LOAD_S * executor.captures  # of the calibration load
    return {f"points of {table}": count for table, count in points.items()} | {"about_minutes": seconds / 60}


def drift_since(profile: Profile, executor: Executor, progress: Progress) -> dict[str, float]:
    """Measure the machine's drift since it was profiled, with a progress bar."""
    with progress.bar("drift", count_drift(profile)) as show:
        return measure_drift(executor, profile, show)


def check_drift(profile: Profile, executor: Executor, progress: Progress) -> dict[str, Any]:
    """Measure a sample of a profile's points again, with a progress bar. Returns a `drift_report`."""
    with progress.status("getting ready"):
        check = DriftCheck(executor, profile)
    with progress.bar("check", check.total) as show:
        found = check.run(show)
    return drift_report(executor, profile, found)


def check_profile(profile: Profile, executor: Executor, config: ServingConfig) -> None:
    """Raises TandemError if a profile is of another model, machine or dtype, was measured for smaller batches, or keeps
    no held-out batches: its drift could not be measured after the runs."""
    check_same(profile, executor, ("device", "dtype", "model shape"))
    for limit in MEMORY_LIMITS if profile.meta.limits else ():
        measured, wanted = getattr(profile.meta.limits, limit), getattr(config, limit)
        if measured < wanted:
            raise TandemError(f"the profile was measured for a {limit} of {measured}, not {wanted}")
    if not count_drift(profile):
        raise TandemError("the profile keeps no held-out batches, by which its drift is measured")
