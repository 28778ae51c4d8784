"""`tandem memory`, `tandem simulate`, `tandem run`: what a card holds, and a trace served by either rider."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis import options
from analysis.commands.output import console, print_facts, print_result, say_notes
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
    as_json: options.AsJson = False,
) -> None:
    """Serve a trace in simulation, on the times of a profile; under several policies with --against."""
    from analysis.workflow import simulate_run, simulated_config
    from sim.profile import find_profile, read_profile

    times, requests = read_profile(find_profile(profile)), read_trace(trace)
    say_notes(requests)
    template = read_run(like) if like else None
    config = simulated_config(times, limits, template)
    if against is not None:
        return _simulate_policies(requests, times, config, against.split(","), out, template, check, as_json)
    run = simulate_run(requests, times, config, out, console, template, check=check)
    _print_summary(run, out, as_json)


def _simulate_policies(
    trace: Trace,
    profile: Profile,
    config: ServingConfig,
    against: Sequence[str],
    out: Path,
    like: RunRecords | None,
    check: bool,
    as_json: bool,
) -> None:
    from analysis.policies import policy_tables
    from analysis.workflow import simulate_policies

    policies = [config.scheduler, *filter(None, against)]
    comparison = simulate_policies(trace, profile, config, policies, out, console, like, check)
    print_result(comparison, as_json, policy_tables, width=100 + max(map(len, comparison["policies"])))
    if not as_json:
        console.print(f"page: {out / 'policies.html'}", highlight=False)


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
) -> None:
    """Serve a trace for real, on this machine. Ctrl-C keeps what was recorded, marked partial."""
    from analysis.workflow import load_executor, real_config, real_run

    options.check_stops(stops)
    requests = read_trace(trace)
    say_notes(requests)
    executor = load_executor(loading, console)
    done = real_run(requests, executor, real_config(executor, limits), out, console, stops, check)
    _print_summary(done, out, as_json)


def _print_summary(run: RunRecords, out: Path, as_json: bool) -> None:
    shown = {name: value for name, value in run.summary.items() if as_json or not name.startswith(("std_", "median_"))}
    print_facts(shown, as_json, str(out))
