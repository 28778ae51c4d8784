"""`tandem profile`: the times of a machine, measured, derived or imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from analysis.cli import options
from analysis.cli.options import Commands, argument, but, option, with_groups
from analysis.cli.output import print_result, progress
from analysis.jobs.options import INPUT, OUTPUT, Limits, Loading
from analysis.report.run_summary import Fact, facts_table
from analysis.report.tables import amount
from engine.model.config import load_model_config
from sim.profile.format import Profile, check_profile_out, find_profile, read_profile, write_profile
from traces.errors import TandemError

app = Commands(name="profile", invoke_without_command=True)
Source = Annotated[Path, option(options.A_PROFILE, "--from", group=INPUT, metavar="PROFILE")]


OutProfile = Annotated[
    Path | None,
    option("Folder to write.", "--out", "-o", default="none; all but --check need one", group=OUTPUT),
]
Roofline = Annotated[
    str | None,
    option(
        "Compute times from the data sheet of a GPU, such as a100-80gb, instead of measuring.",
        default="none; this machine is measured",
        metavar="GPU",
    ),
]
Plan = Annotated[bool, option("Print what would be measured, and about how long it takes.")]
Check = Annotated[
    Path | None,
    option(
        "Measure some points of this profile again on this machine, and judge whether it still holds.",
        default="none; a profile is made",
        metavar="PROFILE",
    ),
]
CheckAsJson = Annotated[bool, option("Print what --check found as JSON instead of a table.", "--json", group=OUTPUT)]


@app.callback()
@with_groups
def profile(
    loading: Loading,
    limits: Annotated[Limits, but("scheduler", "pipeline_depth", "prefix_caching")],
    context: typer.Context,
    out: OutProfile = None,
    roofline: Roofline = None,
    plan: Plan = False,
    check: Check = None,
    overwrite: options.Overwrite = False,
    as_json: CheckAsJson = False,
) -> None:
    """Measure this machine's times of every kind of step, for simulations.

    Called again after an interruption, it goes on from there. With --check, the exit status is 0 if the profile is to
    be trusted, else 1. The commands below measure nothing.
    """
    from analysis.jobs.profile import measure, plan_facts
    from analysis.jobs.run import load_within
    from sim.sources.roofline import roofline_profile

    if context.invoked_subcommand:
        return
    if check is not None:
        raise typer.Exit(_check_profile(check, limits, loading, as_json))
    if out is None:
        raise TandemError("profile needs --out, the folder to write; see tandem profile -h")
    check_profile_out(out, overwrite or plan)
    if roofline is not None:
        made = roofline_profile(roofline, load_model_config(loading.model), limits.block_size or 16)
        return _write(made, out, overwrite)
    executor, settled = load_within(loading, limits, progress)
    if plan:
        title = f"Profile of {executor.model.name} on {executor.device}"
        found = plan_facts(executor, settled.config, progress)
        return print_result(found, False, lambda facts: [facts_table([*map(_fact, facts.items())], title)])
    measure(executor, settled.config, out, progress, overwrite)
    progress.note(f"{out}: profile written")


@app.command("import")
def profile_import(
    sources: Annotated[
        list[Path],
        argument("Published folder or file. A table that several sources have is that of the first.", "SOURCE..."),
    ],
    out: options.Out,
    model: options.ModelShape,
    hardware: Annotated[
        str | None, option("GPU, such as a100-80gb.", default="the one that the source names", metavar="GPU")
    ] = None,
    source_format: Annotated[
        str | None,
        option(
            "Format of the sources: llmservingsim, aiconfigurator or vidur.",
            "--format",
            default="told by the files",
            group=INPUT,
            metavar="FORMAT",
        ),
    ] = None,
    block_size: options.BlockSize = 16,
    overwrite: options.Overwrite = False,
) -> None:
    """Make a profile from measurements that others published.

    They are of other kernels and another engine, and the profile says so. Sources are folders of LLMServingSim (with
    dense.csv and attention.csv) and of AIConfigurator (with gemm_perf.parquet), and Vidur's .csv of dense operations.
    Tables that no source has come from the GPU's data sheet, and meta.yaml names them.
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

    Times of matrix products and attention of equal shape are reused. The rest is estimated, and meta.yaml says how for
    every table. On that GPU, `tandem profile --check` measures some points of the result.
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
        argument("Run that the GPU served, from little load to all that it can serve.", "RUN..."),
    ],
    out: options.Out,
    overwrite: options.Overwrite = False,
) -> None:
    """Make a profile with the in-service times of captured steps, from runs that a GPU served.

    A GPU at its power limit is slower the more it has computed just before. `tandem profile` serves a calibration load
    to learn this. Here other runs take its place.
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
    """List the profiles that ship: who measured them, and how well they predict points left out of them."""
    from analysis.report.profile_list import list_profiles, profile_tables

    print_result(list_profiles(), as_json, profile_tables)


def _fact(item: tuple[str, float]) -> Fact:
    name, value = item
    return Fact("time", amount(value), "minutes, about") if name == "about_minutes" else Fact(name, amount(value))


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
