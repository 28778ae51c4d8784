"""`tandem bench`: this machine's engine, simulator and server, timed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis.cli import options
from analysis.cli.options import listed, read_count, read_rate, read_seed
from analysis.cli.output import print_json, print_result, progress, say_notes
from analysis.jobs.options import Limits, Loading
from traces.trace import read_trace

if TYPE_CHECKING:
    from analysis.bench.common import Benchmark

app = typer.Typer(help="Time this machine as other engines are timed.", no_args_is_help=True)

# The baselines' 20 rows: as many tokens in many ways, contexts up to 64k, and batches up to 256.
ROWS = (
    "128x128,64x256,32x512,16x1024,8x2048,4x4096,2x8192,2x16384,2x32700,1x65336,"
    "1x128,1x1024,8x128,8x1024,32x128,64x1024,128x512,256x128,256x512,256x1024"
)
BenchOut = Annotated[Path | None, typer.Option("--out", "-o", help="A file that gets the JSON as well.")]


@app.command("serve")
def bench_serve(
    loads: Annotated[
        str, typer.Option(help="STREAMSxRATE: at once, and tokens a second of each.")
    ] = "2000x10,1000x10,2000x5",
    seconds: Annotated[float, typer.Option(help="How long a stream runs.", min=1)] = 15,
    model: options.Model = "smollm2",
    as_json: options.AsJson = False,
) -> None:
    """Load the server with streams and say what its path adds to each token, and whether any was lost.

    The engine is a simulation of even steps; server, engine and client share this machine.
    """
    from analysis.bench.server_path import Offered, load_table, measure_load, read_load

    offered = [Offered(*load, seconds) for load in listed("--loads", loads, read_load, "2000x10,1000x10")]
    measured = [measure_load(each, model, progress) for each in offered]
    print_result(measured, as_json, lambda found: [load_table(found)], width=110)


@app.command("forward")
@options.takes_limits("max_seqs", "max_model_len", max_batched_tokens=65536, pipeline_depth=2)
@options.takes_loading()
def bench_forward(
    limits: Limits,
    loading: Loading,
    rows: Annotated[str, typer.Option(help="BATCHxINPUT, with commas between.")] = ROWS,
    outputs: Annotated[int, typer.Option(help="Decode steps that are timed.", min=1)] = 64,
    repeats: Annotated[int, typer.Option(help="Of each measurement.", min=1)] = 3,
    out: BenchOut = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Time a prefill and a decode step of batches that are handed in at once. Ctrl-C keeps what was measured."""
    from analysis.bench.common import read_batch
    from analysis.bench.forward import Forward

    batches = listed("--rows", rows, read_batch, "1x128,8x1024")
    _bench(Forward(batches, outputs, repeats, limits), loading, out, overwrite, as_json)


@app.command("online")
@options.takes_limits(max_seqs=256, max_batched_tokens=2048, pipeline_depth=2)
@options.takes_loading()
def bench_online(
    limits: Limits,
    loading: Loading,
    trace: options.TracePath,
    rates: Annotated[str, typer.Option(help="Requests a second, with commas between; '' for none.")] = "5,10,20,30,40",
    all_at_once: Annotated[bool, typer.Option("--all-at-once", help="Also 2,000 requests at time 0.")] = False,
    seeds: Annotated[str, typer.Option(help="Of the arrivals, with commas between: a run each.")] = "0,1,2",
    seconds: Annotated[float, typer.Option(help="How long requests arrive.", min=0)] = 40,
    keep: Annotated[Path | None, typer.Option(help="A folder that gets the records of every run.")] = None,
    out: BenchOut = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Serve a trace's requests, in its order, at Poisson arrivals of several rates. Ctrl-C keeps what was measured."""
    from analysis.bench.online import Online, scenarios

    wanted = listed("--rates", rates, read_rate, "5,10,20"), listed("--seeds", seeds, read_seed, "0,1,2")
    requests = read_trace(trace)
    say_notes(requests)
    benchmark = Online(scenarios(requests, *wanted, seconds, all_at_once), limits, keep, overwrite)
    _bench(benchmark, loading, out, overwrite, as_json)


@app.command("simulate")
@options.takes_limits(max_seqs=256, pipeline_depth=1)
def bench_simulate(
    limits: Limits,
    trace: options.TracePath,
    profile: options.ProfilePath = Path("a100-80gb/llama-3-8b"),
    rates: Annotated[str, typer.Option(help="Requests a second, with commas between.")] = "6,2",
    requests: options.Requests = 2000,
    scale: Annotated[str, typer.Option(help="Numbers of requests, a row each at the highest rate.")] = "",
    repeats: Annotated[int, typer.Option(help="Of each measurement; the best counts.", min=2)] = 3,
    out: BenchOut = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Time the simulator: steps a second, their cost in bare SimPy timeouts, where it goes, memory, start."""
    from analysis.bench.common import check_out_file
    from analysis.bench.simulator import SimulateBench, print_simulate
    from analysis.jobs.run import write_json
    from sim.profile.format import find_profile

    each_rate = listed("--rates", rates, read_rate, "6,2")
    counts = listed("--scale", scale, read_count, "10000,100000")
    bench = SimulateBench(trace, find_profile(profile), limits, each_rate, requests, counts, repeats)
    bench.check()
    check_out_file(out, overwrite)
    document = bench.run(progress)
    if out:
        write_json(out, document)
    if as_json:
        print_json(document)
    else:
        print_simulate(document)


def _bench(benchmark: Benchmark, loading: Loading, out: Path | None, overwrite: bool, as_json: bool) -> None:
    from analysis.bench.common import check_benchmark, run_benchmark
    from analysis.jobs.run import load_executor

    check_benchmark(benchmark, out, overwrite)
    executor = load_executor(loading, progress)
    run_benchmark(benchmark, executor, out, as_json, progress, load_format=loading.load_format)
