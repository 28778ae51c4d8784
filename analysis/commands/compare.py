"""`tandem compare` and `tandem validate`: how far a simulated run is from a real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from analysis import options
from analysis.commands.output import console, print_json, print_result
from analysis.options import Limits, Loading
from engine.records import read_run
from traces.errors import TandemError

app = typer.Typer()
VALIDATED = Path("runs/validate")


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="SIM REAL", help="A simulated run and a real one of the same trace; with --rank, more."),
    ],
    profile: Annotated[Path | None, typer.Option("--profile", "-p", help="The latency profile simulated on.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; --rank can do without.")] = None,
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
) -> None:
    """Set a simulated run beside a real one: decisions, latency model, closed loop, and where the error comes from.

    Writes compare.json and report.html. With --rank: are several policies ordered as hardware orders them?
    """
    allowed = allow_different or ()
    if out:
        options.check_new(out / ("ranking.json" if rank else "compare.json"), overwrite)
    if rank:
        if profile or repeat or ablate:
            raise TandemError("--rank takes runs alone: no --profile, --repeat or --ablate")
        _rank(runs, out, allowed, as_json)
    else:
        _compare(runs, profile, out, repeat or (), allowed, ablate or (), as_json)


def _compare(
    runs: Sequence[Path],
    profile: Path | None,
    out: Path | None,
    repeat: Sequence[Path],
    allowed: Sequence[str],
    ablate: Sequence[str],
    as_json: bool,
) -> None:
    from analysis.ablation import read_terms
    from analysis.report import print_comparison
    from analysis.workflow import compare_runs
    from sim.profile import find_profile, read_profile

    if len(runs) != 2:
        raise TandemError(f"compare takes SIM and REAL, not {len(runs)} runs; for more, give --rank")
    if profile is None or out is None:
        raise TandemError(f"compare needs {'--profile' if profile is None else '--out'} (only --rank does without)")
    times = read_profile(find_profile(profile))
    terms = read_terms(ablate, times)
    sim, real, *repeats = (read_run(path) for path in (*runs, *repeat))
    comparison = compare_runs(sim, real, repeats, times, out, console, allowed, terms=terms)
    if as_json:
        print_json(comparison)
    else:
        print_comparison(comparison, Console())
        console.print(f"report: {out / 'report.html'}", highlight=False)


def _rank(runs: Sequence[Path], out: Path | None, allowed: Sequence[str], as_json: bool) -> None:
    from analysis.ranking import rank, ranking_tables
    from analysis.workflow import write_json

    ranking = rank({str(path): read_run(path) for path in runs}, allowed)
    if out:
        write_json(out / "ranking.json", ranking)
    print_result(ranking, as_json, ranking_tables)


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
    from analysis.validate import Job, validate_matrix, validate_one

    limits = replace(limits, max_model_len=max_total)
    job = Job(out, loading, requests, rate, seed, max_total, repeats, limits, overwrite or out == VALIDATED)
    return (validate_matrix if matrix else validate_one)(job, console)
