"""`tandem bench`: this machine's engine, simulator, server and kernels, timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from analysis.cli import options
from analysis.cli.options import Commands, but, listed, option, read_rate, read_whole
from analysis.cli.output import print_result, progress, read_noted
from analysis.jobs.files import check_new_file, write_json
from analysis.jobs.options import Limits, Loading, Output

if TYPE_CHECKING:
    from analysis.bench.common import Benchmark
    from analysis.bench.forward import Forward
    from analysis.bench.online import Online

app = Commands(name="bench", help="Time this machine as other engines are timed.", no_args_is_help=True)

# The baselines' 20 rows: as many tokens in many ways, contexts up to 64k, and batches up to 256.
ROWS = (
    "128x128,64x256,32x512,16x1024,8x2048,4x4096,2x8192,2x16384,2x32700,1x65336,"
    "1x128,1x1024,8x128,8x1024,32x128,64x1024,128x512,256x128,256x512,256x1024"
)
WIDTH = 160
Rates = Annotated[str, option("Requests a second, with commas between; '' for none.")]


@app.command("serve")
def bench_serve(
    output: Output,
    loads: Annotated[str, option("STREAMSxRATE: at once, and tokens a second of each.")] = "2000x10,1000x10,2000x5",
    seconds: Annotated[float, option("How long a stream runs.", min=1)] = 15,
    model: options.Model = "smollm2",
) -> None:
    """Load the server with streams: the latency that its path adds to each token, and whether any was lost.

    The engine is a simulation of even steps; server, engine and client share this machine.
    """
    from analysis.bench.server_path import Offered, read_streams, server_path

    offered = [Offered(*load, seconds) for load in listed("--loads", loads, read_streams, "2000x10,1000x10")]
    _bench(partial(server_path, offered, model, progress), output)


@app.command("forward")
def bench_forward(
    output: Output,
    loading: Loading,
    limits: Annotated[Limits, but("max_seqs", "max_model_len", max_batched_tokens=65536, pipeline_depth=2)],
    rows: Annotated[str, option("BATCHxINPUT, with commas between.")] = ROWS,
    outputs: Annotated[int, option("Decode steps that are timed.", min=1)] = 64,
    repeats: Annotated[int, option("Of each measurement.", min=1)] = 3,
) -> None:
    """Time a prefill and a decode step of batches that are handed in at once. Ctrl-C keeps what was measured."""
    from analysis.bench.common import read_batch
    from analysis.bench.forward import Forward

    batches = listed("--rows", rows, read_batch, "1x128,8x1024")
    _bench_executor(Forward(batches, outputs, repeats, limits), loading, output)


@app.command("online")
def bench_online(
    output: Output,
    loading: Loading,
    limits: Annotated[Limits, but(max_seqs=256, max_batched_tokens=2048, pipeline_depth=2)],
    trace: options.TracePath,
    rates: Rates = "5,10,20,30,40",
    all_at_once: Annotated[bool, option("Also 2,000 requests at time 0.", "--all-at-once")] = False,
    seeds: Annotated[str, option("Of the arrivals, with commas between: a run each.")] = "0,1,2",
    seconds: Annotated[float, option("How long requests arrive.", min=0)] = 40,
    keep: Annotated[Path | None, option("A folder that gets the records of every run.")] = None,
) -> None:
    """Serve a trace's requests, in its order, at Poisson arrivals of several rates. Ctrl-C keeps what was measured."""
    from analysis.bench.online import Online, scenarios

    check_new_file(output)
    wanted = listed("--rates", rates, read_rate, "5,10,20"), listed("--seeds", seeds, read_whole, "0,1,2")
    found = scenarios(read_noted(trace), *wanted, seconds, all_at_once)
    _bench_executor(Online(found, limits, keep, output.overwrite), loading, output)


@app.command("simulate")
def bench_simulate(
    output: Output,
    limits: Annotated[Limits, but(max_seqs=256, pipeline_depth=1)],
    trace: options.TracePath,
    profile: options.ProfilePath = Path("a100-80gb/llama-3-8b"),
    rates: Rates = "6,2",
    requests: options.Requests = 2000,
    scale: Annotated[str, option("Numbers of requests, a row each at the highest rate.")] = "",
    repeats: Annotated[int, option("Of each measurement; the best counts.", min=2)] = 3,
) -> None:
    """Time the simulator: steps a second, their cost in bare SimPy timeouts, by part, memory, start."""
    from analysis.bench.simulator import SimulateBench
    from sim.profile.format import find_profile

    check_new_file(output)
    each_rate = listed("--rates", rates, read_rate, "6,2")
    counts = listed("--scale", scale, partial(read_whole, least=1), "10000,100000")
    bench = SimulateBench(trace, find_profile(profile), limits, each_rate, requests, counts, repeats)
    bench.check()
    _bench(partial(bench.on, progress), output)


@app.command("kernels")
def bench_kernels(
    output: Output,
    dtype: Annotated[str, option("float16, bfloat16 or float32.")] = "float16",
    block_size: options.BlockSize = 16,
    head_dim: Annotated[int, option("With --tune: of the heads.", min=1)] = 128,
    tune: Annotated[bool, option("Time tile shapes instead, best first.", "--tune")] = False,
) -> None:
    """Time each kernel on this GPU against the ceiling that bounds it. Ctrl-C keeps what was measured."""
    from analysis.bench.kernels import kernels

    _bench(partial(kernels, dtype, block_size, head_dim, tune, progress), output)


def _bench_executor(bench: Forward | Online, loading: Loading, output: Output) -> None:
    """Check all that can be checked, then load the model."""
    from analysis.jobs.limits import config_to_check
    from analysis.jobs.run import check_before, load_executor

    bench.check()
    check_before(config_to_check(bench.limits))
    _bench(lambda: bench.on(load_executor(loading, progress), progress, load_format=loading.load_format), output)


def _bench(make: Callable[[], Benchmark], output: Output) -> None:
    """Make, run, print and write it. An error that ended it early is raised then."""
    from analysis.bench.common import document_tables, run_benchmark

    check_new_file(output)
    benchmark = make()
    document, failure = run_benchmark(benchmark)
    print_result(document, output.as_json, partial(document_tables, benchmark), WIDTH)
    if output.out:
        write_json(output.out, document)
    if failure:
        raise failure
