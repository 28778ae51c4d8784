"""`tandem profile`: how long a machine takes, measured, derived or imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis.cli import options
from analysis.cli.output import print_facts, print_result, progress
from analysis.jobs.options import Limits, Loading
from traces.errors import TandemError

if TYPE_CHECKING:
    from engine.config import ServingConfig
    from engine.executor.executor import Executor

app = typer.Typer(invoke_without_command=True)


@app.callback()
@options.takes_limits("scheduler", "pipeline_depth", "prefix_caching")
@options.takes_loading()
def profile(
    limits: Limits,
    loading: Loading,
    context: typer.Context,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; needed to measure.")] = None,
    roofline: Annotated[str | None, typer.Option(help="From a data sheet, unmeasured: a100-80gb, …")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be measured, and about how long it takes.")
    ] = False,
    check: Annotated[
        Path | None, typer.Option(help="Is this profile still true? Measures some of its points again on this machine.")
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --check: print JSON instead of a table.")] = False,
) -> None:
    """Measure how long this machine takes for every kind of step: what a simulation runs on.

    Interrupted, it goes on from there when it is called again. The commands below measure nothing.
    --check ends with status 0 where the profile is to be trusted, else 1.
    """
    from analysis.jobs.limits import real_limits
    from analysis.jobs.run import load_executor, measure
    from sim.profile.format import check_profile_out

    if context.invoked_subcommand:
        return
    if check is not None:
        raise typer.Exit(_check_profile(check, limits, loading, as_json))
    if out is None:
        raise TandemError("profile needs --out, the folder to write; see tandem profile --help")
    check_profile_out(out, overwrite or plan)
    if roofline is not None:
        from engine.model.config import load_model_config
        from sim.profile.format import write_profile
        from sim.sources.roofline import roofline_profile

        made = roofline_profile(roofline, load_model_config(loading.model), limits.block_size or 16)
        write_profile(made, out, overwrite)
    else:
        executor = load_executor(loading, progress)
        settled = real_limits(executor, limits)
        settled.say(progress)
        if plan:
            return _print_plan(executor, settled.config)
        measure(executor, settled.config, out, progress, overwrite)
    progress.note(f"{out}: profile written")


@app.command("import")
def profile_import(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="As published; where several have a table, the first's is taken."),
    ],
    out: options.Out,
    model: options.ModelShape,
    hardware: Annotated[str | None, typer.Option(help="The card, if no source names it: a100-80gb, …")] = None,
    source_format: Annotated[
        str | None, typer.Option("--format", help="llmservingsim, aiconfigurator or vidur; default: by its files.")
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per KV block.", min=1)] = 16,
    overwrite: options.Overwrite = False,
) -> None:
    """Make a profile of measurements that others published: of other kernels and another engine, and it says so.

    Reads LLMServingSim's folders (dense.csv, attention.csv, …), AIConfigurator's (gemm_perf.parquet, …) and Vidur's
    .csv of dense operations. What they lack comes from the card's data sheet; meta.yaml says what that is.
    """
    from engine.model.config import load_model_config
    from sim.profile.format import write_profile
    from sim.sources.importers import import_profile

    made = import_profile(sources, load_model_config(model), hardware, source_format, block_size)
    write_profile(made, out, overwrite)
    for table, origin in made.meta["tables"].items():
        progress.note(f"{table}: {origin['how']} {origin.get('source', '')}".rstrip())
    progress.note(f"{out}: profile written")


@app.command("derive")
def profile_derive(
    source: Annotated[Path, typer.Option("--from", help="A profile's folder, or one that ships.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The other model's shape: llama-2-7b, …")],
    out: options.Out,
    overwrite: options.Overwrite = False,
) -> None:
    """Make a profile of another model on a profiled card.

    What both models share is reused: matrix products and attention of equal shape. The rest is estimated, and meta.yaml
    says of every table which and how. --check measures such a profile's points where the card is at hand.
    """
    from engine.model.config import load_model_config
    from sim.profile.format import find_profile, read_profile, write_profile
    from sim.sources.derive import derive_profile

    made = derive_profile(read_profile(find_profile(source)), load_model_config(model), source.as_posix())
    write_profile(made, out, overwrite)
    for table, origin in made.meta["tables"].items():
        for rule in origin["rules"]:
            progress.note(f"{table} {origin['how']}: {rule}")
    progress.note(f"{out}: profile written")


@app.command("calibrate")
def profile_calibrate(
    source: Annotated[Path, typer.Option("--from", help="A profile's folder, measured on a GPU.")],
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Served there, from little load to all that the machine can do."),
    ],
    out: options.Out,
    overwrite: options.Overwrite = False,
) -> None:
    """Make a profile that knows what captured steps take while serving, from runs that were served.

    A GPU at its power limit is the slower the more it has computed just before. tandem profile serves a run of its own
    to learn this; here others take its place.
    """
    from engine.records.manifest import config_of
    from engine.records.run_folder import read_run
    from sim.profile.format import check_profile_out, find_profile, read_profile, write_profile
    from sim.profiling.calibration import calibrate

    check_profile_out(out, overwrite)
    served = [read_run(run) for run in runs]
    with progress.status("replaying"):
        made = calibrate(read_profile(find_profile(source)), [(run, config_of(run.manifest)) for run in served])
    write_profile(made, out, overwrite)
    progress.note(f"{out}: profile written")


@app.command("list")
def profile_list(as_json: options.AsJson = False) -> None:
    """List the profiles that ship: whose measurements, and how well they predict points left out of them."""
    from analysis.report.profile_list import list_profiles, profile_tables

    print_result(list_profiles(), as_json, profile_tables, width=120)


def _check_profile(folder: Path, limits: Limits, loading: Loading, as_json: bool) -> int:
    from analysis.jobs.run import check_drift, load_executor
    from analysis.report.gpu_tables import drift_table
    from sim.profile.format import find_profile, read_profile

    if limits.said():
        raise TandemError(f"--check takes the profile's own limits: leave out {', '.join(limits.said())}")
    profile = read_profile(find_profile(folder))
    report = check_drift(profile, load_executor(loading, progress), progress)
    print_result(report, as_json, lambda found: [drift_table(found)], width=120)
    return 0 if report["verdict"] == "trusted" else 1


def _print_plan(executor: Executor, config: ServingConfig) -> None:
    from sim.profiling.calibration import LEVEL_S, LEVELS
    from sim.profiling.profiler import estimate

    with progress.status("timing a few measurements"):
        points, seconds = estimate(executor, config)
    seconds += len(LEVELS) * LEVEL_S * executor.captures  # of the run that is served
    facts = {f"points of {table}": count for table, count in points.items()}
    print_facts(
        facts | {"about_minutes": seconds / 60}, False, f"Profile of {executor.model.name} on {executor.device}"
    )
