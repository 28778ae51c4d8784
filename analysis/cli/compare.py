"""`tandem compare` and `tandem validate`: how far a simulated run is from a real one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from analysis.cli import options
from analysis.cli.output import print_json, print_result, progress
from analysis.comparison.compare import RIDERS, check_once, check_roles, is_met, rider
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
            help="Predict without these terms too: host, skew, head, graph-padding, power, kv-blocks, by commas."
        ),
    ] = None,
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
    allowed = allow_different or ()
    if out:
        check_new(out / ("ranking.json" if rank else "compare.json"), overwrite)
    if rank:
        if profile or repeat or ablate:
            raise TandemError("--rank takes runs alone: no --profile, --repeat or --ablate")
        return _rank(runs, out, allowed, as_json)
    if len(runs) != 2:
        raise TandemError(f"compare takes SIM and REAL, not {len(runs)} runs; for more, give --rank")
    found = _read(runs, repeat or ())
    if all(rider(str(path), found[path]) == RIDERS["simulator"] for path in runs):
        if profile or repeat or ablate:
            raise TandemError(
                f"{runs[0]} and {runs[1]} are both simulated: leave out --profile, --repeat and --ablate, which take a "
                "real run, or give that as REAL"
            )
        return _compare_simulations({path: found[path] for path in runs}, out, allowed, as_json)
    return _compare(runs, found, profile, out, repeat or (), allowed, ablate or (), as_json)


def _read(runs: Sequence[Path], repeats: Sequence[Path]) -> dict[Path, RunRecords]:
    """Runs by path. Raises TandemError if one is given twice."""
    paths = [path.resolve() for path in (*runs, *repeats)]
    if twice := [path for place, path in enumerate((*runs, *repeats)) if paths[place] in paths[:place]]:
        raise TandemError(f"{twice[0]} is given twice: a run agrees with itself; give each run once")
    found = {path: read_run(path) for path in (*runs, *repeats)}
    check_once({str(path): run for path, run in found.items()})
    return found


def _compare_simulations(
    runs: Mapping[Path, RunRecords], out: Path | None, allowed: Sequence[str], as_json: bool
) -> int:
    from analysis.comparison.simulations import compare_simulations, simulation_tables, write_simulation_page

    named = {str(path): run for path, run in runs.items()}
    first, second = named.items()
    comparison = compare_simulations(first, second, allowed)
    if out:
        write_json(out / "simulations.json", comparison)
        write_simulation_page(comparison, named, out / "simulations.html")
    print_result(comparison, as_json, simulation_tables, width=110 + max(map(len, named)))
    if out and not as_json:
        progress.note(f"page: {out / 'simulations.html'}")
    return 0 if comparison["requests"] else 1


def _compare(
    paths: Sequence[Path],
    runs: Mapping[Path, RunRecords],
    profile: Path | None,
    out: Path | None,
    repeat: Sequence[Path],
    allowed: Sequence[str],
    ablate: Sequence[str],
    as_json: bool,
) -> int:
    from analysis.comparison.ablation import read_terms
    from analysis.jobs.compare import compare_runs
    from analysis.report.comparison_page import print_comparison
    from sim.profile.format import find_profile, read_profile

    named = {str(path): run for path, run in runs.items()}
    check_roles(str(paths[0]), str(paths[1]), named, [str(path) for path in repeat])
    if profile is None or out is None:
        raise TandemError(
            f"compare needs {'--profile' if profile is None else '--out'} (only --rank and two simulations do without)"
        )
    times = read_profile(find_profile(profile))
    terms = read_terms(ablate, times)
    sim, real, *repeats = runs.values()
    comparison = compare_runs(sim, real, repeats, times, out, progress, allowed, terms=terms)
    if as_json:
        print_json(comparison)
    else:
        print_comparison(comparison, Console())
        progress.note(f"report: {out / 'report.html'}")
    return 0 if is_met(comparison) else 1


def _rank(runs: Sequence[Path], out: Path | None, allowed: Sequence[str], as_json: bool) -> int:
    from analysis.comparison.ranking import rank, ranking_tables

    ranking = rank({str(path): run for path, run in _read(runs, ()).items()}, allowed)
    if out:
        write_json(out / "ranking.json", ranking)
    print_result(ranking, as_json, ranking_tables)
    return 0 if ranking["orders"] else 1


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
    matrix: Annotated[bool, typer.Option("--matrix", help="All policies at both depths, blocks scarce.")] = False,
    overwrite: options.Overwrite = False,
) -> int:
    """The whole job: trace, profile (if there is none), simulate, run for real, compare. Writes OUT/report.html.

    What an earlier validation left in the default OUT is made anew; in another, with --overwrite.
    """
    from analysis.jobs.validate import Job, validate_matrix, validate_one

    limits = replace(limits, max_model_len=max_total)
    job = Job(out, loading, requests, rate, seed, max_total, repeats, limits, overwrite or out == VALIDATED)
    return (validate_matrix if matrix else validate_one)(job, progress)
