"""`tandem profile`: the times of a machine, measured, derived or imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from analysis.cli import options
from analysis.cli.options import Commands, but, option, with_groups
from analysis.cli.output import facts_table, print_result, progress
from analysis.jobs.options import Limits, Loading
from engine.model.config import load_model_config
from sim.profile.format import Profile, check_profile_out, find_profile, read_profile, write_profile
from traces.errors import TandemError

app = Commands(name="profile", invoke_without_command=True)
Source = Annotated[Path, option("A profile's folder, or one that ships.", "--from")]


@app.callback()
@with_groups
def profile(
    loading: Loading,
    limits: Annotated[Limits, but("scheduler", "pipeline_depth", "prefix_caching")],
    context: typer.Context,
    out: Annotated[Path | None, option("Where to write.", "--out", "-o")] = None,
    roofline: Annotated[str | None, option("From a data sheet, unmeasured: a100-80gb, …")] = None,
    plan: Annotated[bool, option("Say what would be measured, and about how long it takes.", "--plan")] = False,
    check: Annotated[Path | None, option("A profile, of which some points are measured again on this machine.")] = None,
    overwrite: options.Overwrite = False,
    as_json: Annotated[bool, option("With --check: print JSON instead of a table.", "--json")] = False,
) -> None:
    """Measure the times of this machine for every kind of step. A simulation runs on them.

    Interrupted, it goes on from there when it is called again. The commands below measure nothing.
    --check tells whether a profile is still true, and ends with status 0 where it is to be trusted, else 1.
    """
    from analysis.jobs.profile import measure, plan_facts
    from analysis.jobs.run import load_within
    from sim.sources.roofline import roofline_profile

    if context.invoked_subcommand:
        return
    if check is not None:
        raise typer.Exit(_check_profile(check, limits, loading, as_json))
    if out is None:
        raise TandemError("profile needs --out, the folder to write; see tandem profile --help")
    check_profile_out(out, overwrite or plan)
    if roofline is not None:
        made = roofline_profile(roofline, load_model_config(loading.model), limits.block_size or 16)
        return _write(made, out, overwrite)
    executor, settled = load_within(loading, limits, progress)
    if plan:
        title = f"Profile of {executor.model.name} on {executor.device}"
        found = plan_facts(executor, settled.config, progress)
        return print_result(found, False, lambda facts: facts_table(facts, title))
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
    hardware: Annotated[str | None, option("The GPU, if no source names it: a100-80gb, …")] = None,
    source_format: Annotated[str | None, option("llmservingsim, aiconfigurator or vidur.", "--format")] = None,
    block_size: options.BlockSize = 16,
    overwrite: options.Overwrite = False,
) -> None:
    """Make a profile of measurements that others published: of other kernels and another engine, and it says so.

    Reads LLMServingSim's folders (dense.csv, attention.csv, …), AIConfigurator's (gemm_perf.parquet, …) and Vidur's
    .csv of dense operations, by their files unless --format is given. The rest comes from the GPU's data sheet, and
    meta.yaml names it.
    """
    from sim.sources.importers import import_profile

    check_profile_out(out, overwrite)
    made = import_profile(sources, load_model_config(model), hardware, source_format, block_size)
    notes = [f"{table}: {of['how']} {of.get('source', '')}".rstrip() for table, of in (made.meta.tables or {}).items()]
    _write(made, out, overwrite, *notes)


@app.command("derive")
def profile_derive(
    source: Source, model: options.ModelShape, out: options.Out, overwrite: options.Overwrite = False
) -> None:
    """Make a profile of another model on a profiled GPU.

    Matrix products and attention of equal shape are reused. The rest is estimated, and meta.yaml says of every table
    which and how. --check measures such a profile's points where the GPU is at hand.
    """
    from sim.sources.derive import derive_profile

    check_profile_out(out, overwrite)
    made = derive_profile(read_profile(find_profile(source)), load_model_config(model), source.as_posix())
    tables = (made.meta.tables or {}).items()
    _write(made, out, overwrite, *(f"{table} {of['how']}: {rule}" for table, of in tables for rule in of["rules"]))


@app.command("calibrate")
def profile_calibrate(
    source: Source,
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Served there, from little load to all that the machine can do."),
    ],
    out: options.Out,
    overwrite: options.Overwrite = False,
) -> None:
    """Make a profile with the in-service times of captured steps, from runs that were served.

    A GPU at its power limit is the slower the more it has computed just before. tandem profile serves a calibration
    load to learn this; here other runs take its place.
    """
    from engine.records.manifest import config_of
    from engine.records.run_folder import read_run
    from sim.profiling.calibration import calibrate

    check_profile_out(out, overwrite)
    served = [read_run(run) for run in runs]
    with progress.status("replaying"):
        made = calibrate(read_profile(find_profile(source)), [(run, config_of(run.manifest)) for run in served])
    _write(made, out, overwrite)


@app.command("list")
def profile_list(as_json: options.AsJson = False) -> None:
    """List the profiles that ship: whose measurements, and how well they predict points left out of them."""
    from analysis.report.profile_list import list_profiles, profile_tables

    print_result(list_profiles(), as_json, profile_tables, width=120)


def _write(made: Profile, out: Path, overwrite: bool, *notes: str) -> None:
    write_profile(made, out, overwrite)
    for note in (*notes, f"{out}: profile written"):
        progress.note(note)


def _check_profile(folder: Path, limits: Limits, loading: Loading, as_json: bool) -> int:
    from analysis.jobs.profile import check_drift
    from analysis.jobs.run import load_executor
    from analysis.report.gpu_tables import drift_table

    if limits.said():
        raise TandemError(f"--check takes the profile's own limits: leave out {', '.join(limits.said())}")
    profile = read_profile(find_profile(folder))
    report = check_drift(profile, load_executor(loading, progress), progress)
    print_result(report, as_json, lambda found: [drift_table(found)])
    return 0 if report["verdict"] == "trusted" else 1
