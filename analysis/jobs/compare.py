"""Compare runs: a simulated one with a real one, policies on hardware and in simulation, policies in simulation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.comparison.ablation import ablate, read_terms
from analysis.comparison.compare import compare
from analysis.comparison.policies import compare_policies
from analysis.comparison.ranking import rank
from analysis.comparison.targets import RUN_TARGETS, Drift, read_targets
from analysis.jobs.files import check_new, write_json
from analysis.jobs.limits import Settled
from analysis.jobs.options import Comparing, RunOptions
from analysis.jobs.progress import Progress
from analysis.jobs.run import check_before, simulate_run
from analysis.report.attribution_tables import attribution_sentence
from analysis.report.comparison_page import write_report
from analysis.report.policy_page import write_policy_page
from analysis.report.study_tables import ranking_sentence
from engine.config import ServingConfig
from engine.records import manifest
from engine.records.run_folder import RunRecords
from sim.negative_controls import negative_controls
from sim.profile.format import Profile
from sim.replay import replay
from traces.errors import TandemError
from traces.trace import Trace


def compare_runs(
    runs: Sequence[RunRecords], profile: Profile, out: Path, progress: Progress, how: Comparing, drift: Drift = None
) -> dict[str, Any]:
    """Replay the real run's times through the simulator, and set the two runs side by side.

    Args:
        runs: the simulated run, the real one, and the same real run again, any number of times.
        profile: that the simulated run used.
        out: the folder that gets compare.json, with report.html beside it.
        progress: where progress is shown.
        how: fields that may differ, terms to leave out one by one, targets.
        drift: as in `analysis.comparison.compare.compare`, whose result is returned, with more beside it.

    Raises:
        TandemError: the targets or a term cannot be read, or the runs are not alike.
    """
    (sim, real, *repeats), targets = runs, read_targets(how.targets, RUN_TARGETS)
    terms = read_terms(how.ablate or (), profile)
    config = manifest.config_of(real.manifest)
    changed = manifest.changed_sources(real.manifest)
    if changed:
        note = f"note: {', '.join(changed)} changed since the real run was recorded: its replay plans with today's"
        progress.note(note)
    replayed = replay(real, config, profile)
    comparison = compare(sim, real, replayed, repeats, how.allow_different or (), targets=targets, drift=drift)
    if comparison["attribution"]:
        comparison["attribution"]["sentence"] = attribution_sentence(comparison["attribution"])
    comparison["decisions"] |= {"changed_sources": changed, "negative_controls": negative_controls(real, config)}
    if terms:
        with progress.bar("ablate", len(terms) + 1) as show:
            comparison["ablation"] = ablate(real, replayed, profile, terms, show)
    write_json(out / "compare.json", comparison)
    title = f"{config.scheduler} at depth {config.pipeline_depth}: simulated and real"
    write_report(comparison, sim, real, replayed, out / "report.html", title=title)
    return comparison


def rank_runs(runs: Mapping[str, RunRecords], allow_different: Collection[str] = ()) -> dict[str, Any]:
    """As `analysis.comparison.ranking.rank`, with a `sentence` that says how many orders are right."""
    ranking = rank(runs, allow_different)
    return ranking | {"sentence": ranking_sentence(ranking)}


# -- several policies ------------------------------------------------------------------------------------------


def simulate_policies(
    trace: Trace, profile: Profile, settled: Settled, against: str, out: Path, progress: Progress, options: RunOptions
) -> dict[str, Any]:
    """Serve a trace in simulation under several policies, and set them side by side.

    Args:
        settled: the limits, which are said, and the policy that others are compared to.
        against: the others, which commas separate. The rest as in `simulate_run`.

    Returns:
        The comparison (`analysis.comparison.policies.compare_policies`), also written to `out` as policies.json, with
        policies.html and a folder for each policy beside it.

    Raises:
        TandemError: a policy or a folder is bad, before anything is simulated; or as `simulate_run`.
        UnmetError: as `simulate_run`; policies before the one that was refused keep their folders.
    """
    policies = filter(None, (settled.config.scheduler, *against.split(",")))
    folders = {policy: out / _folder_name(policy) for policy in policies}
    configs = [replace(settled.config, scheduler=policy) for policy in folders]
    _check_policies(configs, folders, out, options.overwrite)
    settled.say(progress)
    runs = {}
    for config, (policy, folder) in zip(configs, folders.items(), strict=True):
        labelled = replace(options, label=policy.ljust(max(map(len, folders))))
        runs[policy] = simulate_run(trace, profile, config, folder, progress, labelled)
    comparison = compare_policies(runs)
    write_json(out / "policies.json", comparison)
    title = f"{len(runs)} policies, {len(trace.requests):,} requests on {profile.name}"
    write_policy_page(comparison, runs, out / "policies.html", title)
    return comparison


def _check_policies(configs: Sequence[ServingConfig], folders: Mapping[str, Path], out: Path, overwrite: bool) -> None:
    """Raises TandemError if a policy is bad, or `out` holds what may not be overwritten."""
    if len({*folders.values()}) < len(folders):
        raise TandemError(f"two of {', '.join(folders)} would be written to one folder: call a file otherwise")
    if (out / "manifest.json").exists():
        raise TandemError(f"{out} is a run: choose another --out, for a folder of runs")
    check_new(out / "policies.json", overwrite)
    for config in configs:
        check_before(config, folders[config.scheduler], overwrite)


def _folder_name(policy: str) -> str:
    """Of one folder, even if a policy is given by the path of its file."""
    return policy.replace(":", "-").replace("/", "-").lstrip(".-")
