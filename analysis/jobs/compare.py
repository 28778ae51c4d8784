"""Compare a simulated run with a real one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.comparison.ablation import ablate
from analysis.comparison.compare import compare
from analysis.comparison.targets import RUN_TARGETS, Targets
from analysis.jobs.files import write_json
from analysis.jobs.progress import Progress
from analysis.report.attribution_tables import attribution_sentence
from analysis.report.comparison_page import write_report
from engine.records import manifest
from engine.records.run_folder import RunRecords
from sim.negative_controls import negative_controls
from sim.profile.format import Profile
from sim.replay import replay


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
    replayed = replay(real, config, profile)
    comparison = compare(sim, real, replayed, repeats, allow_different, targets=targets, drift=drift)
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
