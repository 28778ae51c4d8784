"""`tandem memory`, `tandem simulate`, `tandem run`: what a card holds, and a trace served by either rider."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis import options
from analysis.commands.output import console, print_result, print_run, say_notes
from analysis.options import Limits, Loading
from engine.records import RunRecords, read_run
from traces.format import Trace, read_trace

if TYPE_CHECKING:
    from engine.config import ServingConfig
    from sim.profile import Profile

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
    from analysis.card import card_memory, memory_table
    from engine.model_config import load_model_config

    shape = load_model_config(model)
    terms = card_memory(hardware, shape, dtype, limits.config(num_blocks=1))
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
    as_json: options.AsJson = False,
) -> int:
    """Serve a trace in simulation, on the times of a profile; under several policies with --against.

    The exit status is 1 if no request completed.
    """
    from analysis.workflow import simulate_run, simulated_config
    from sim.profile import find_profile, read_profile

    times, requests = read_profile(find_profile(profile)), read_trace(trace)
    say_notes(requests)
    template = read_run(like) if like else None
    config = simulated_config(times, limits, template)
    if against is not None:
        return _simulate_policies(requests, times, config, against.split(","), out, template, check, strict, as_json)
    run = simulate_run(requests, times, config, out, console, template, check=check, strict=strict)
    return _print_summary(run, out, as_json)


def _simulate_policies(
    trace: Trace,
    profile: Profile,
    config: ServingConfig,
    against: Sequence[str],
    out: Path,
    like: RunRecords | None,
    check: bool,
    strict: bool,
    as_json: bool,
) -> int:
    from analysis.policies import policy_tables
    from analysis.workflow import simulate_policies

    policies = [config.scheduler, *filter(None, against)]
    comparison = simulate_policies(trace, profile, config, policies, out, console, like, check, strict)
    print_result(comparison, as_json, policy_tables, width=110 + max(map(len, comparison["policies"])))
    if not as_json:
        console.print(f"page: {out / 'policies.html'}", highlight=False)
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
    as_json: options.AsJson = False,
) -> int:
    """Serve a trace for real, on this machine. Ctrl-C keeps what was recorded, marked partial.

    The exit status is 1 if no request completed.
    """
    from analysis.workflow import load_executor, real_config, real_run

    options.check_stops(stops)
    requests = read_trace(trace)
    say_notes(requests)
    executor = load_executor(loading, console)
    done = real_run(requests, executor, real_config(executor, limits), out, console, stops, check)
    return _print_summary(done, out, as_json)


def _print_summary(run: RunRecords, out: Path, as_json: bool) -> int:
    nested = ("not_completed", "profile_lookups")  # said in words
    names = [name for name in run.summary if name not in nested and not name.startswith(("std_", "median_"))]
    return print_run(run, as_json, str(out), names)
