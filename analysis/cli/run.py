"""`tandem memory`, `tandem simulate`, `tandem run`: a GPU's memory, and a trace served by either backend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from analysis.cli import options
from analysis.cli.options import OF_A_GPU, OF_A_PROFILE, Commands, argument, but, option
from analysis.cli.output import print_result, print_run, progress, read_noted
from analysis.jobs.limits import config_to_check, gpu_limits, simulated_limits
from analysis.jobs.options import INPUT, MODEL, POLICY, Limits, Loading, RunOptions, TraceReading
from engine.model.config import load_model_config
from engine.records.run_folder import check_out, read_run
from sim.profile.format import find_profile, read_profile
from traces.outputs import check_writable

app = Commands()


@app.command()
def memory(
    limits: Annotated[
        Limits,
        but("scheduler", "pipeline_depth", "num_blocks", "num_cpu_blocks", words=OF_A_GPU, block_size=64),
    ],
    hardware: Annotated[str, argument("GPU: a100-80gb, h100-80gb, h200 or rtx4090.", "GPU")],
    model: options.ModelShape,
    dtype: Annotated[
        str, option("Data type of weights and KV cache: float16, bfloat16 or float32.", group=MODEL, metavar="DTYPE")
    ] = "float16",
    as_json: options.AsJson = False,
) -> None:
    """Predict how many KV blocks a GPU holds beside a model, and what else takes its memory."""
    from analysis.report.gpu_tables import gpu_memory, memory_table

    shape = load_model_config(model)
    terms = gpu_memory(hardware, shape, dtype, gpu_limits(shape, limits).config)
    title = f"{shape.name} {dtype} on {hardware}"
    print_result(terms, as_json, lambda found: [memory_table(found, title)])


SIMULATE_EPILOG = """
Examples:

  tandem simulate -t trace.parquet -p h100-80gb/llama-3-8b -o sim
  tandem simulate -t trace.parquet -p h100-80gb/llama-3-8b -o policies \\
      --scheduler sjf --against fcfs,chunked_prefill:budget=512
  tandem simulate -t trace.parquet -p profile --like real -o sim
"""
RUN_EPILOG = """
Examples:

  tandem run -t trace.parquet -o real
  tandem run -t trace.parquet -o real --scheduler my_policy.py:MyPolicy --check
"""


Like = Annotated[
    Path | None,
    option(
        "Run to simulate again: limits and policy that are not given are those of this run, and requests stop "
        "where they stopped there.",
        default="none; requests stop at the output length in the trace",
        group=INPUT,
        metavar="RUN",
    ),
]
Against = Annotated[
    str | None,
    option(
        "Policies to compare --scheduler with, separated by commas.",
        default="none; one policy is simulated",
        group=POLICY,
        metavar="POLICIES",
    ),
]


@app.command(epilog=SIMULATE_EPILOG)
def simulate(
    how: Annotated[RunOptions, but("stop_rule")],
    limits: Annotated[Limits, but(words=OF_A_PROFILE)],
    reading: TraceReading,
    trace: options.TracePath,
    profile: options.ProfilePath,
    out: options.Out,
    like: Like = None,
    against: Against = None,
    as_json: options.AsJson = False,
) -> int:
    """Serve a trace in simulation, with the step times of a latency profile.

    The run is written to the folder --out. With --against, each policy has a folder in it, and policies.html compares
    them. Limits that are not given are printed with their origins. The exit status is 1 if no request completed.
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
        return print_run(simulate_run(requests, times, settled.config, out, progress, how), as_json, str(out))
    comparison = simulate_policies(requests, times, settled, against, out, progress, how)
    print_result(comparison, as_json, policy_tables)
    if not as_json:
        progress.note(f"HTML page: {out / 'policies.html'}")
    return 0 if comparison["requests"] else 1


@app.command(epilog=RUN_EPILOG)
def run(
    how: Annotated[RunOptions, but("strict")],
    loading: Loading,
    limits: Limits,
    reading: TraceReading,
    trace: options.TracePath,
    out: options.Out,
    as_json: options.AsJson = False,
) -> int:
    """Serve a trace for real, on this machine.

    Limits that are not given follow from the machine, the model and the memory; they are printed. Ctrl-C keeps the
    records so far, marked partial. The exit status is 1 if no request completed.
    """
    from analysis.jobs.run import check_before, load_within, real_run

    check_before(config_to_check(limits), out, how.overwrite)
    requests = read_noted(trace, reading)
    executor, settled = load_within(loading, limits, progress)
    done = real_run(requests, executor, settled.config, out, progress, replace(how, facts=settled.facts))
    return print_run(done, as_json, str(out))
