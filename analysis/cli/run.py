"""`tandem memory`, `tandem simulate`, `tandem run`: a GPU's memory, and a trace served by either backend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from analysis.cli import options
from analysis.cli.options import Commands, but, option
from analysis.cli.output import print_result, print_run, progress, read_noted
from analysis.jobs.limits import config_to_check, gpu_limits, simulated_limits
from analysis.jobs.options import Limits, Loading, RunOptions, TraceReading
from engine.model.config import load_model_config
from engine.records.run_folder import RunRecords, check_out, read_run
from sim.profile.format import find_profile, read_profile
from traces.outputs import check_writable

app = Commands()


@app.command()
def memory(
    limits: Annotated[Limits, but("scheduler", "pipeline_depth", "num_blocks", "num_cpu_blocks", block_size=64)],
    hardware: Annotated[str, typer.Argument(help="A GPU: a100-80gb, h100-80gb, h200, rtx4090.")],
    model: options.ModelShape,
    dtype: Annotated[str, option("float16, bfloat16 or float32.")] = "float16",
    as_json: options.AsJson = False,
) -> None:
    """Predict how many KV blocks a GPU holds beside a model, and the terms of its memory."""
    from analysis.report.gpu_tables import gpu_memory, memory_table

    shape = load_model_config(model)
    terms = gpu_memory(hardware, shape, dtype, gpu_limits(shape, limits).config)
    title = f"{shape.name} {dtype} on {hardware}"
    print_result(terms, as_json, lambda found: [memory_table(found, title)])


@app.command()
def simulate(
    how: Annotated[RunOptions, but("stop_rule")],
    limits: Limits,
    reading: TraceReading,
    trace: options.TracePath,
    profile: options.ProfilePath,
    out: options.Out,
    like: Annotated[Path | None, option("A run that gives limits and policy, and where requests stopped.")] = None,
    against: Annotated[str | None, option("Policies to compare --scheduler with, by commas: a folder each.")] = None,
    as_json: options.AsJson = False,
) -> int:
    """Serve a trace in simulation, on the times of a profile; under several policies with --against.

    Limits that are not given are the profile's, else the model's and its GPU's; they are printed. Several policies get
    a folder of OUT each, and policies.html. The exit status is 1 if no request completed.
    """
    from analysis.jobs.compare import simulate_policies
    from analysis.jobs.run import check_before, check_like, simulate_run
    from analysis.report.policy_page import policy_tables

    times = read_profile(find_profile(profile))
    if against is None:
        check_out(out, how.overwrite)
    check_writable(out / "run")
    requests = read_noted(trace, reading)
    template = read_run(like) if like else None
    settled = simulated_limits(times, limits, template)
    how = replace(how, facts=settled.facts, like=template)
    check_like(requests, template)
    if against is None:
        check_before(settled.config, out, how.overwrite)
        settled.say(progress)
        return _print_summary(simulate_run(requests, times, settled.config, out, progress, how), out, as_json)
    comparison = simulate_policies(requests, times, settled, against, out, progress, how)
    print_result(comparison, as_json, policy_tables, width=110 + max(map(len, comparison["policies"])))
    if not as_json:
        progress.note(f"HTML page: {out / 'policies.html'}")
    return 0 if comparison["requests"] else 1


@app.command()
def run(
    how: Annotated[RunOptions, but("strict")],
    loading: Loading,
    limits: Limits,
    reading: TraceReading,
    trace: options.TracePath,
    out: options.Out,
    as_json: options.AsJson = False,
) -> int:
    """Serve a trace for real, on this machine. Ctrl-C keeps what was recorded, marked partial.

    Limits that are not given follow from the model and the memory; they are printed. The exit status is 1 if no
    request completed.
    """
    from analysis.jobs.run import check_before, load_within, real_run

    check_before(config_to_check(limits), out, how.overwrite)
    requests = read_noted(trace, reading)
    executor, settled = load_within(loading, limits, progress)
    done = real_run(requests, executor, settled.config, out, progress, replace(how, facts=settled.facts))
    return _print_summary(done, out, as_json)


def _print_summary(run: RunRecords, out: Path, as_json: bool) -> int:
    nested = ("not_completed", "profile_lookups")  # said in words
    names = [name for name in run.summary if name not in nested and not name.startswith(("std_", "median_"))]
    return print_run(run, as_json, str(out), names)
