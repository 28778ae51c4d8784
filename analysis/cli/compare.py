"""`tandem compare` and `tandem validate`: how far a simulated run is from a real one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from analysis.cli import options
from analysis.cli.output import print_json, print_result, progress
from analysis.comparison.runs import SIMULATED, check_once, check_roles, run_kind
from analysis.comparison.targets import RUN_TARGETS, read_targets
from analysis.jobs.files import check_new, write_json
from analysis.jobs.options import Limits, Loading
from engine.records.run_folder import RunRecords, read_run
from traces.errors import TandemError

app = typer.Typer()
VALIDATED = Path("runs/validate")


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="SIM REAL", help="A simulated run and a real one of the same trace, or two simulated; --rank: more."
        ),
    ],
    profile: Annotated[Path | None, typer.Option("--profile", "-p", help="The latency profile simulated on.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write; --rank and two simulations can do without.")
    ] = None,
    repeat: Annotated[list[Path] | None, typer.Option(help="The real run again; may be given several times.")] = None,
    allow_different: Annotated[list[str] | None, typer.Option(help="A manifest field that may differ.")] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(
            help="Predict without these terms too: host, imbalance (of the contexts), head, graph-padding, power, "
            "kv-blocks, by commas."
        ),
    ] = None,
    targets: options.RunTargets = None,
    rank: Annotated[
        bool,
        typer.Option(
            "--rank", help="Order policies: give a simulated run of each, and a real one or more, in any order."
        ),
    ] = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> int:
    """Set a simulated run beside a real one: decisions, latency model, closed loop, and where the error comes from.

    Writes compare.json and report.html. Two simulated runs get a table of their own. With --rank: are several policies
    ordered as hardware orders them? The exit status is 1 if decisions differ, an error is outside, or no request
    completed; 0 on a machine too noisy to judge.
    """
    if out:
        check_new(out / ("ranking.json" if rank else "compare.json"), overwrite)
    if len(runs) != 2 and not rank:
        raise TandemError(f"compare takes SIM and REAL, not {len(runs)} runs; for more, give --rank")
    found, allowed = _read([*runs, *(repeat or ())]), allow_different or ()
    simulated = not rank and all(run_kind(str(path), found[str(path)]) == SIMULATED for path in runs)
    if (rank or simulated) and (profile or repeat or ablate or targets):
        alone = f"{runs[0]} and {runs[1]} are both simulated, and two simulations take" if simulated else "--rank takes"
        raise TandemError(f"{alone} no --profile, --repeat, --ablate or --targets: leave these out")
    if rank:
        return _rank(found, out, allowed, as_json)
    if simulated:
        return _compare_simulations(found, out, allowed, as_json)
    check_roles(str(runs[0]), str(runs[1]), found, [*found][2:])
    if profile is None or out is None:
        missing = "--profile" if profile is None else "--out"
        raise TandemError(f"compare needs {missing} (only --rank and two simulations do without)")
    return _compare([*found.values()], profile, out, allowed, ablate or (), targets, as_json)


def _read(paths: Sequence[Path]) -> dict[str, RunRecords]:
    """Runs by path. Raises TandemError if one is given twice."""
    known = [path.resolve() for path in paths]
    if twice := [path for place, path in enumerate(paths) if known[place] in known[:place]]:
        raise TandemError(f"{twice[0]} is given twice: a run agrees with itself; give each run once")
    found = {str(path): read_run(path) for path in paths}
    check_once(found)
    return found


def _rank(runs: Mapping[str, RunRecords], out: Path | None, allowed: Sequence[str], as_json: bool) -> int:
    from analysis.jobs.study import rank_runs
    from analysis.report.study_tables import ranking_tables

    ranking = rank_runs(runs, allowed)
    if out:
        write_json(out / "ranking.json", ranking)
    print_result(ranking, as_json, ranking_tables)
    return 0 if ranking["orders"] else 1


def _compare_simulations(
    runs: Mapping[str, RunRecords], out: Path | None, allowed: Sequence[str], as_json: bool
) -> int:
    from analysis.comparison.policies import compare_simulations
    from analysis.report.policy_page import policy_tables, write_policy_page

    first, second = runs.items()
    comparison = compare_simulations(first, second, allowed)
    if out:
        write_json(out / "simulations.json", comparison)
        write_policy_page(comparison, runs, out / "simulations.html", f"{' and '.join(runs)}: two simulations")
    print_result(comparison, as_json, policy_tables, width=110 + max(map(len, runs)))
    if out and not as_json:
        progress.note(f"HTML page: {out / 'simulations.html'}")
    return 0 if comparison["requests"] else 1


def _compare(
    runs: Sequence[RunRecords],
    profile: Path,
    out: Path,
    allowed: Sequence[str],
    ablate: Sequence[str],
    targets: str | None,
    as_json: bool,
) -> int:
    from analysis.comparison.ablation import read_terms
    from analysis.jobs.compare import compare_runs
    from sim.profile.format import find_profile, read_profile

    times, limits = read_profile(find_profile(profile)), read_targets(targets, RUN_TARGETS)
    sim, real, *repeats = runs
    terms = read_terms(ablate, times)
    comparison = compare_runs(sim, real, repeats, times, out, progress, allowed, terms=terms, targets=limits)
    return _print_comparison(comparison, out, as_json)


def _print_comparison(comparison: Mapping[str, Any], out: Path, as_json: bool = False) -> int:
    from analysis.comparison.compare import is_met
    from analysis.report.comparison_page import print_comparison

    if as_json:
        print_json(comparison)
    else:
        print_comparison(comparison, Console())
        progress.note(f"report: {out / 'report.html'}")
    return 0 if is_met(comparison) else 1


@app.command()
@options.takes_limits("max_model_len", max_seqs=16, max_batched_tokens=128, pipeline_depth=1)
@options.takes_loading()
def validate(
    limits: Limits,
    loading: Loading,
    out: options.Out = VALIDATED,
    requests: options.Requests = 36,
    rate: options.Rate = 0.5,
    seed: options.Seed = 0,
    max_total: Annotated[int, typer.Option(help="Drop longer prompt + output; also --max-model-len.")] = 512,
    repeats: Annotated[int, typer.Option(help="Further real runs, for the spread.", min=0)] = 1,
    targets: options.RunTargets = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="All policies at both depths, blocks scarce.")] = False,
    overwrite: options.Overwrite = False,
) -> int:
    """The whole job: trace, profile (if there is none), simulate, run for real, compare. Writes OUT/report.html.

    What an earlier validation left in the default OUT is made anew; in another, with --overwrite.
    """
    from analysis.jobs.study import Validation, validate, validate_matrix
    from analysis.report.study_tables import matrix_table

    limits = replace(limits, max_model_len=max_total)
    anew, allowed = overwrite or out == VALIDATED, read_targets(targets, RUN_TARGETS)
    job = Validation(out, loading, requests, rate, seed, max_total, repeats, limits, anew, allowed)
    if not matrix:
        return _print_comparison(validate(job, progress), out)
    rows = validate_matrix(job, progress)
    print_result(rows, False, lambda found: [matrix_table(found)])
    return 0 if all(row["identical"] and row["controls"] for row in rows) else 1
