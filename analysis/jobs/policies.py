"""Serve a trace in simulation under several policies, and set them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.comparison.policies import compare_policies
from analysis.jobs.files import check_new, write_json
from analysis.jobs.options import AS_USUAL, RunOptions
from analysis.jobs.progress import Progress
from analysis.jobs.run import check_before, simulate_run
from analysis.report.policy_page import write_policy_page
from engine.config import ServingConfig
from engine.records.run_folder import RunRecords
from sim.profile.format import Profile
from traces.errors import TandemError
from traces.trace import Trace


def simulate_policies(
    trace: Trace,
    profile: Profile,
    configs: Sequence[ServingConfig],
    out: Path,
    progress: Progress,
    like: RunRecords | None = None,
    options: RunOptions = AS_USUAL,
) -> dict[str, Any]:
    """Serve a trace in simulation under several policies, and set them side by side.

    Args:
        configs: of the policies; all but the first are compared to the first. The rest as in `simulate_run`.

    Returns:
        The comparison (`analysis.comparison.policies.compare_policies`), also written to `out` as policies.json, with
        policies.html and a folder for each policy beside it.

    Raises:
        TandemError: a policy or a folder is bad, before anything is simulated; or as `simulate_run`.
        UnmetError: as `simulate_run`; policies before the one that was refused keep their folders.
    """
    check_policies(configs, out, options.overwrite)
    width = max(len(config.scheduler) for config in configs)
    runs = {}
    for config in configs:
        policy = config.scheduler
        folder, label = out / _folder_name(policy), policy.ljust(width)
        runs[policy] = simulate_run(trace, profile, config, folder, progress, like, options, label)
    comparison = compare_policies(runs)
    write_json(out / "policies.json", comparison)
    title = f"{len(runs)} policies, {len(trace.requests):,} requests on {profile.name}"
    write_policy_page(comparison, runs, out / "policies.html", title)
    return comparison


def with_policies(config: ServingConfig, against: str) -> list[ServingConfig]:
    """A config, and the same with each of the other policies, which commas separate."""
    return [
        replace(config, scheduler=policy) for policy in dict.fromkeys((config.scheduler, *against.split(","))) if policy
    ]


def check_policies(configs: Sequence[ServingConfig], out: Path, overwrite: bool) -> None:
    """Raises TandemError if a policy is bad, or `out` holds what may not be overwritten."""
    folders = {config.scheduler: out / _folder_name(config.scheduler) for config in configs}
    if len(set(folders.values())) < len(folders):
        raise TandemError(f"two of {', '.join(folders)} would be written to one folder: call a file otherwise")
    if (out / "manifest.json").exists():
        raise TandemError(f"{out} is a run: choose another --out, for a folder of runs")
    check_new(out / "policies.json", overwrite)
    for config in configs:
        check_before(config, folders[config.scheduler], overwrite)


def _folder_name(policy: str) -> str:
    """Of one folder, even if a policy is given by the path of its file."""
    return policy.replace(":", "-").replace("/", "-").lstrip(".-")
