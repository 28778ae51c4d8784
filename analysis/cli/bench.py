"""`tandem bench`: this machine's engine, simulator, server and kernels, timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from analysis.cli import options
from analysis.cli.options import OF_A_PROFILE, Commands, but, listed, option, read_rate, read_whole
from analysis.cli.output import print_result, progress, read_noted
from analysis.jobs.files import check_new_file, write_json
from analysis.jobs.options import MODEL, OUTPUT, Limits, Loading, Output

if TYPE_CHECKING:
    from analysis.bench.common import Benchmark
    from analysis.bench.forward import Forward
    from analysis.bench.online import Online

app = Commands(name="bench", help="Benchmark the engine, the simulator, the server and the kernels on this machine.")

# The baselines' 20 rows: as many tokens in many ways, contexts up to 64k, and batches up to 256.
ROWS = (
    "128x128,64x256,32x512,16x1024,8x2048,4x4096,2x8192,2x16384,2x32700,1x65336,"
    "1x128,1x1024,8x128,8x1024,32x128,64x1024,128x512,256x128,256x512,256x1024"
)
Rates = Annotated[
    str, option("Arrival rates, in requests per second, separated by commas; '' for none.", metavar="RATES")
]


@app.command("serve")
def bench_serve(
    output: Output,
    loads: Annotated[
        str,
        option(
            "Loads, separated by commas: STREAMSxRATE, streams at once and tokens per second of each.", metavar="LOADS"
        ),
    ] = "2000x10,1000x10,2000x5",
    seconds: Annotated[float, option("Seconds that a stream runs.", min=1, metavar="SECONDS")] = 15,
    model: options.Model = "smollm2",
) -> None:
    """Measure the latency that the server adds to each token, under many streams, and whether any token was lost.

    The engine is a simulation of even steps. Server, engine and client share this machine.
    """
    from analysis.bench.server_path import Offered, read_streams, server_path

    offered = [Offered(*load, seconds) for load in listed("--loads", loads, read_streams, "2000x10,1000x10")]
    _bench(partial(server_path, offered, model, progress), output)


@app.command("forward")
def bench_forward(
    output: Output,
    loading: Loading,
    limits: Annotated[Limits, but("max_seqs", "max_model_len", max_batched_tokens=65536, pipeline_depth=2)],
    rows: Annotated[
        str,
        option(
            "Batches, separated by commas: BATCHxINPUT, requests and prompt tokens of each.",
            default="20 batches, from 1x128 to 256x1024, with contexts to 65,336 tokens",
            metavar="BATCHES",
        ),
    ] = ROWS,
    outputs: Annotated[int, option("Decode steps that are timed.", min=1)] = 64,
    repeats: Annotated[int, option("Times that each batch is measured.", min=1)] = 3,
) -> None:
    """Time a prefill step and decode steps of batches that are handed in at once.

    Ctrl-C keeps what was measured.
    """
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
    all_at_once: Annotated[bool, option("Serve 2,000 requests that arrive at time 0, too.")] = False,
    seeds: Annotated[
        str, option("Seeds of the arrivals, separated by commas; a run for each.", metavar="SEEDS")
    ] = "0,1,2",
    seconds: Annotated[float, option("Seconds in which requests arrive.", min=0, metavar="SECONDS")] = 40,
    keep: Annotated[
        Path | None,
        option("Folder for the records of every run.", default="none; records are not kept", group=OUTPUT),
    ] = None,
) -> None:
    """Serve the requests of a trace, in its order, at Poisson arrivals of several rates.

    Ctrl-C keeps what was measured.
    """
    from analysis.bench.online import Online, scenarios

    check_new_file(output)
    wanted = listed("--rates", rates, read_rate, "5,10,20"), listed("--seeds", seeds, read_whole, "0,1,2")
    found = scenarios(read_noted(trace), *wanted, seconds, all_at_once)
    _bench_executor(Online(found, limits, keep, output.overwrite), loading, output)


@app.command("simulate")
def bench_simulate(
    output: Output,
    limits: Annotated[Limits, but(words=OF_A_PROFILE, max_seqs=256, pipeline_depth=1)],
    trace: options.TracePath,
    profile: options.ProfilePath = Path("a100-80gb/llama-3-8b"),
    rates: Rates = "6,2",
    requests: options.Requests = 2000,
    scale: Annotated[
        str,
        option(
            "Numbers of requests to simulate at the highest rate, separated by commas, such as 10000,100000.",
            default="none; only --requests are simulated",
            metavar="COUNTS",
        ),
    ] = "",
    repeats: Annotated[int, option("Times that each row is measured; the best counts.", min=2)] = 3,
) -> None:
    """Time the simulator: steps per second, cost of a step by part, memory, and start."""
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
    dtype: Annotated[str, option("Data type: float16, bfloat16 or float32.", group=MODEL, metavar="DTYPE")] = "float16",
    block_size: options.BlockSize = 16,
    head_dim: Annotated[int, option("Dimension of an attention head, for --tune.", min=1)] = 128,
    tune: Annotated[bool, option("Time tile shapes of the attention kernels instead, best first.")] = False,
) -> None:
    """Time each kernel on this GPU, and compare it with the rate that bounds it.

    Ctrl-C keeps what was measured.
    """
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
    print_result(document, output.as_json, partial(document_tables, benchmark))
    if output.out:
        write_json(output.out, document)
    if failure:
        raise failure
