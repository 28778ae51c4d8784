"""`tandem compare` and `tandem validate`: how far a simulated run is from a real one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from analysis.cli.options import Commands, argument, but
from analysis.cli.output import print_json, print_result, progress, standard_output
from analysis.comparison.runs import SIMULATED, check_once, check_roles, run_kind
from analysis.comparison.targets import RUN_TARGETS, read_targets
from analysis.jobs.files import check_new, write_json
from analysis.jobs.options import Comparing, Limits, Loading, Validation
from engine.records.run_folder import RunRecords, read_run
from traces.errors import TandemError

app = Commands()
EPILOG = """
Examples:

  tandem compare sim real --repeat again --profile profile --out report
  tandem compare --rank fcfs-sim fcfs-real sjf-sim sjf-real
"""
RUNS = "A simulated and a real run of the same trace, or two simulated ones; with --rank, more."


@app.command(epilog=EPILOG)
def compare(runs: Annotated[list[Path], argument(RUNS, "SIM REAL...")], how: Comparing) -> int:
    """Compare a simulated run with a real one: decisions, latency model, closed loop, and where the error comes from.

    Writes compare.json and report.html. Of two simulated runs, it prints both side by side. With --rank, it says
    whether simulation orders policies as hardware does.

    The exit status is 1 if decisions differ, an error is larger than allowed, or no request completed. It is 0 if the
    machine was too noisy to judge.
    """
    from analysis.jobs.compare import compare_runs
    from sim.profile.format import find_profile, read_profile

    if how.out:
        check_new(how.out / ("ranking.json" if how.rank else "compare.json"), how.overwrite)
    if len(runs) != 2 and not how.rank:
        raise TandemError(f"compare takes SIM and REAL, not {len(runs)} runs; for more, give --rank")
    found = _read([*runs, *(how.repeat or ())])
    simulated = not how.rank and all(run_kind(str(path), found[str(path)]) == SIMULATED for path in runs)
    if (how.rank or simulated) and (how.profile or how.repeat or how.ablate or how.targets):
        alone = f"{runs[0]} and {runs[1]} are both simulated, and two simulations take" if simulated else "--rank takes"
        raise TandemError(f"{alone} no --profile, --repeat, --ablate or --targets: leave these out")
    if how.rank:
        return _rank(found, how)
    if simulated:
        return _compare_simulations(found, how)
    check_roles(found)
    if how.profile is None or how.out is None:
        missing = "--profile" if how.profile is None else "--out"
        raise TandemError(f"compare needs {missing} (only --rank and two simulations do without)")
    profile = read_profile(find_profile(how.profile))
    return _print_comparison(compare_runs([*found.values()], profile, how.out, progress, how), how.out, how.as_json)


def _read(paths: Sequence[Path]) -> dict[str, RunRecords]:
    """Runs by path. Raises TandemError if one is given twice."""
    known = [path.resolve() for path in paths]
    if twice := [path for place, path in enumerate(paths) if known[place] in known[:place]]:
        raise TandemError(f"{twice[0]} is given twice: a run agrees with itself; give each run once")
    found = {str(path): read_run(path) for path in paths}
    check_once(found)
    return found


def _rank(runs: Mapping[str, RunRecords], how: Comparing) -> int:
    from analysis.jobs.compare import rank_runs
    from analysis.report.study_tables import ranking_tables

    ranking = rank_runs(runs, how.allow_different or ())
    if how.out:
        write_json(how.out / "ranking.json", ranking)
    print_result(ranking, how.as_json, ranking_tables)
    return 0 if ranking["orders"] else 1


def _compare_simulations(runs: Mapping[str, RunRecords], how: Comparing) -> int:
    from analysis.comparison.policies import compare_simulations
    from analysis.report.policy_page import policy_tables, write_policy_page

    comparison = compare_simulations(runs, how.allow_different or ())
    if how.out:
        write_json(how.out / "simulations.json", comparison)
        write_policy_page(comparison, runs, how.out / "simulations.html", f"{' and '.join(runs)}: two simulations")
    print_result(comparison, how.as_json, policy_tables)
    if how.out and not how.as_json:
        progress.note(f"HTML page: {how.out / 'simulations.html'}")
    return 0 if comparison["requests"] else 1


def _print_comparison(comparison: Mapping[str, Any], out: Path, as_json: bool = False) -> int:
    from analysis.comparison.compare import is_met
    from analysis.report.comparison_page import print_comparison

    if as_json:
        print_json(comparison)
    else:
        print_comparison(comparison, standard_output())
        progress.note(f"report: {out / 'report.html'}")
    return 0 if is_met(comparison) else 1


@app.command()
def validate(
    job: Validation,
    loading: Loading,
    limits: Annotated[Limits, but("max_model_len", max_seqs=16, max_batched_tokens=128, pipeline_depth=1)],
) -> int:
    """Do the whole job: make a trace, profile this machine, simulate, run for real, and compare.

    A profile that --out holds already is used. Writes report.html there. The default folder is written anew each time;
    another one only with --overwrite.
    """
    from analysis.jobs.study import validate, validate_matrix
    from analysis.report.study_tables import matrix_table

    read_targets(job.targets, RUN_TARGETS)  # a mistake in them is said before anything is measured
    limits = replace(limits, max_model_len=job.max_total)
    job = replace(job, overwrite=job.overwrite or job.out == Validation().out)
    if not job.matrix:
        return _print_comparison(validate(job, loading, limits, progress), job.out)
    rows = validate_matrix(job, loading, limits, progress)
    print_result(rows, False, lambda found: [matrix_table(found)])
    return 0 if all(row["identical"] and row["controls"] for row in rows) else 1
