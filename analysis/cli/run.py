"""`tandem memory`, `tandem simulate`, `tandem run`: what a card holds, and a trace served by either rider."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.cli import options
from analysis.cli.output import print_result, print_run, progress, say_notes
from analysis.jobs.options import Limits, Loading
from engine.records.run_folder import RunRecords, read_run
from traces.trace import Trace, read_trace

if TYPE_CHECKING:
    from analysis.jobs.limits import Settled
    from sim.profile.format import Profile

app = typer.Typer()


@app.command()
@options.takes_limits("scheduler", "pipeline_depth", "num_blocks", "num_cpu_blocks", block_size=64)
def memory(
    limits: Limits,
    hardware: Annotated[str, typer.Argument(help="A card: a100-80gb, h100-80gb, h200, rtx4090.")],
    model: options.ModelShape,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    as_json: options.AsJson = False,
) -> None:
    """Predict how many KV blocks a card holds beside a model, and what takes the rest of its memory."""
    from analysis.jobs.limits import card_limits
    from analysis.report.gpu_tables import gpu_memory, memory_table
    from engine.model.config import load_model_config

    shape = load_model_config(model)
    terms = gpu_memory(hardware, shape, dtype, card_limits(shape, limits).config)
    title = f"{shape.name} {dtype} on {hardware}"
    print_result(terms, as_json, lambda found: [memory_table(found, title)])


@app.command()
@options.takes_limits()
def simulate(
    limits: Limits,
    trace: options.TracePath,
    profile: options.ProfilePath,
    out: options.Out,
    like: Annotated[
        Path | None, typer.Option(help="Take limits and policy, and where requests stopped, of this run.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Policies to compare --scheduler with, commas between: a folder of OUT each, and policies.html."
        ),
    ] = None,
    check: options.Check = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Write nothing, and exit with 1, if times lie beyond the profile.")
    ] = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> int:
    """Serve a trace in simulation, on the times of a profile; under several policies with --against.

    Limits that are not given are the profile's, else the model's and its card's; they are printed. The exit status is 1
    if no request completed.
    """
    from analysis.jobs.limits import simulated_limits
    from analysis.jobs.run import check_before, check_like, simulate_run
    from sim.profile.format import find_profile, read_profile

    times, requests = read_profile(find_profile(profile)), read_trace(trace)
    say_notes(requests)
    template = read_run(like) if like else None
    settled = simulated_limits(times, limits, template)
    check_like(requests, template)
    if against is not None:
        policies = against.split(",")
        return _simulate_policies(requests, times, settled, policies, out, template, check, strict, overwrite, as_json)
    check_before(settled.config, out, overwrite)
    settled.say(progress)
    kept: dict[str, Any] = {"overwrite": overwrite, "facts": settled.facts}
    run = simulate_run(requests, times, settled.config, out, progress, template, check=check, strict=strict, **kept)
    return _print_summary(run, out, as_json)


def _simulate_policies(
    trace: Trace,
    profile: Profile,
    settled: Settled,
    against: Sequence[str],
    out: Path,
    like: RunRecords | None,
    check: bool,
    strict: bool,
    overwrite: bool,
    as_json: bool,
) -> int:
    from analysis.jobs.run import check_policies, simulate_policies
    from analysis.report.policy_page import policy_tables

    policies = [settled.config.scheduler, *filter(None, against)]
    check_policies(settled.config, policies, out, overwrite)
    settled.say(progress)
    comparison = simulate_policies(
        trace, profile, settled.config, policies, out, progress, like, check, strict, overwrite, settled.facts
    )
    print_result(comparison, as_json, policy_tables, width=110 + max(map(len, comparison["policies"])))
    if not as_json:
        progress.note(f"HTML page: {out / 'policies.html'}")
    return 0 if comparison["requests"] else 1


@app.command()
@options.takes_limits()
@options.takes_loading()
def run(
    limits: Limits,
    loading: Loading,
    trace: options.TracePath,
    out: options.Out,
    stops: options.Stops = "trace",
    check: options.Check = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> int:
    """Serve a trace for real, on this machine. Ctrl-C keeps what was recorded, marked partial.

    Limits that are not given are what the model and the memory say; they are printed. The exit status is 1 if no
    request completed.
    """
    from analysis.jobs.limits import config_to_check, real_limits
    from analysis.jobs.run import check_before, load_executor, real_run

    options.check_stops(stops)
    check_before(config_to_check(limits), out, overwrite)
    requests = read_trace(trace)
    say_notes(requests)
    executor = load_executor(loading, progress)
    settled = real_limits(executor, limits)
    settled.say(progress)
    done = real_run(requests, executor, settled.config, out, progress, stops, check, overwrite, settled.facts)
    return _print_summary(done, out, as_json)


def _print_summary(run: RunRecords, out: Path, as_json: bool) -> int:
    nested = ("not_completed", "profile_lookups")  # said in words
    names = [name for name in run.summary if name not in nested and not name.startswith(("std_", "median_"))]
    return print_run(run, as_json, str(out), names)
