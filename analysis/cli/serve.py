"""`tandem serve`, and `tandem load`, which is its client."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

from analysis.cli import options
from analysis.cli.options import OF_SERVER, Commands, but, option
from analysis.cli.output import print_run, progress, read_noted, standard_output
from analysis.jobs.options import INPUT, OUTPUT, Limits, Loading, RunOptions, TraceReading
from analysis.jobs.progress import Progress
from engine.records.run_folder import check_out, read_run
from traces.errors import TandemError

app = Commands()
SERVE_EPILOG = """
Examples:

  tandem serve --port 8000
  tandem serve --backend sim --profile h100-80gb/llama-3-8b --out served
"""
LOAD_EPILOG = """
Example:

  tandem load --url http://127.0.0.1:8000 -t trace.parquet -o client
"""


Backend = Annotated[
    str,
    option(
        "Backend: the executor (real), or the simulator at the pace of the clock (sim).",
        group=INPUT,
        metavar="real|sim",
    ),
]
OfSimulator = Annotated[
    Path | None,
    option(
        options.A_PROFILE,
        "--profile",
        "-p",
        default="none; --backend sim needs one",
        group=INPUT,
        metavar="PROFILE",
    ),
]
OutputLen = Annotated[
    str | None,
    option(
        "Distribution of output lengths, in tokens, of --backend sim: fixed:N, uniform:LOW:HIGH or lognormal:MU:SIGMA.",
        default="the max_tokens of each request",
        metavar="DISTRIBUTION",
    ),
]
OutputSeed = Annotated[int, option("Seed of the output lengths of --backend sim.")]
Records = Annotated[
    Path | None,
    option(
        "Folder for the records of the run, written at the end.",
        "--out",
        "-o",
        default="none; no records are kept",
        group=OUTPUT,
    ),
]
Host = Annotated[str, option("Address to listen on; 0.0.0.0 lets other machines in.", metavar="HOST")]
Port = Annotated[int, option("Port to listen on; 0 takes a free one.", min=0, max=65535)]
ServedName = Annotated[
    str | None,
    option("Name of the model for clients.", "--served-model-name", default="the model's name", metavar="NAME"),
]
MaxWaiting = Annotated[
    int, option("Requests that wait for a first token, at most; further ones get status 429.", min=1)
]
MaxBody = Annotated[int, option("Largest body of a request, in MiB.", min=1)]
Drain = Annotated[
    float, option("Seconds that running requests may go on after a signal to stop.", min=0, metavar="SECONDS")
]
AllowHost = Annotated[
    list[str] | None,
    option(
        "Further name that clients use for this server; * is any. May be given again.",
        default="none; addresses, localhost and --host",
        metavar="NAME",
    ),
]
IgnoreSampling = Annotated[
    bool,
    option("Serve requests with sampling parameters such as temperature, greedily, instead of refusing them."),
]


@app.command(epilog=SERVE_EPILOG)
def serve(
    loading: Loading,
    limits: Annotated[Limits, but(words=OF_SERVER)],
    backend: Backend = "real",
    profile: OfSimulator = None,
    output_len: OutputLen = None,
    seed: OutputSeed = 0,
    out: Records = None,
    overwrite: options.Overwrite = False,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: ServedName = None,
    api_key: options.ApiKey = None,
    max_waiting: MaxWaiting = 4096,
    max_body_mb: MaxBody = 16,
    drain: Drain = 30,
    ignore_sampling: IgnoreSampling = False,
    allow_host: AllowHost = None,
) -> None:
    """Serve an OpenAI-compatible API, on the executor or on the simulator.

    The simulator keeps the pace of the clock, so that clients see simulated latencies. --model gives the tokenizer in
    either case. After Ctrl-C or SIGTERM no request is accepted, and running ones are finished.
    """
    from analysis.jobs.serve import RealService, SimService
    from engine.server.app import ServerLimits
    from engine.server.descriptors import FEW, raise_descriptor_limit
    from engine.server.host_check import HostCheck
    from engine.server.serve import serve as run_server
    from engine.server.tokenization import load_text

    _check_backend(backend, profile, output_len)
    kept: dict[str, Any] = {"out": out, "overwrite": overwrite, "progress": _progress}
    service: RealService | SimService
    load_once = cache(partial(load_text, loading.model))
    if profile is None:
        service = RealService(loading, limits, **kept)
    else:  # the simulator needs a few token ids; the tokenizer stays in the API's process
        text = load_once()
        service = SimService(profile, limits, text.filler(), text.vocab_size, output_len, seed, **kept)
    service.check()
    if (most := raise_descriptor_limit()) < FEW:
        progress.note(f"note: at most {most} connections at once, by the limit of open files (ulimit -n)")

    def server_limits(model: str) -> ServerLimits:
        hosts = HostCheck(host, allow_host or ())
        return ServerLimits(name or model, max_waiting, max_body_mb * 2**20, api_key or None, ignore_sampling, hosts)

    run_server(service, load_once, server_limits, host, port, drain, partial(print, "tandem serves on", flush=True))


def _check_backend(backend: str, profile: Path | None, output_len: str | None) -> None:
    if backend not in ("real", "sim"):
        raise TandemError(f"--backend is '{backend}': choose real or sim")
    if backend == "sim" and profile is None:
        raise TandemError("--backend sim needs --profile: a latency profile, or one that ships (tandem profile list)")
    if backend == "real" and (profile is not None or output_len is not None):
        raise TandemError("--profile and --output-len are for --backend sim: an executor has times of its own")


def _progress() -> Progress:
    """In the engine's process too."""
    return progress


Url = Annotated[str, option("Address of the server, such as http://127.0.0.1:8000.", group=INPUT, metavar="URL")]
ModelThere = Annotated[
    str | None,
    option("Name of the model on the server.", "--model", "-m", default="the server's first", metavar="NAME"),
]
VocabSize = Annotated[
    int,
    option("Prompts of which the trace has only the length get random token ids below this number.", min=1),
]
Beside = Annotated[
    Path | None,
    option(
        "Run of the same trace, whose latencies are printed beside the client's.",
        default="none; only the client's are printed",
        metavar="RUN",
    ),
]


@app.command(epilog=LOAD_EPILOG)
def load(
    how: Annotated[RunOptions, but("check", "strict")],
    reading: TraceReading,
    url: Url,
    trace: options.TracePath,
    out: options.Out,
    model: ModelThere = None,
    vocab_size: VocabSize = 1000,
    api_key: options.ApiKey = None,
    against: Beside = None,
    as_json: options.AsJson = False,
) -> int:
    """Send a trace to an OpenAI-compatible server, open loop, and record the client's view as a run.

    Any such server will do. The records have requests and the times of chunks; a client does not see steps. The exit
    status is 1 if no request completed.
    """
    from analysis.client.load_client import find_target
    from analysis.client.records import LATE_MS, load_run, side_by_side
    from analysis.report.tables import print_tables

    check_out(out, how.overwrite)
    workload, other = read_noted(trace, reading), read_run(against) if against else None
    target = find_target(url, model, how.stop_rule, vocab_size, api_key or None)
    run = load_run(workload, target, progress)
    run.write(out, how.overwrite)
    if run.partial:
        progress.note(f"{out}: what came until then is written, marked partial")
        raise KeyboardInterrupt
    if (late := run.summary["p99_send_lag_ms"]) is not None and late > LATE_MS:
        progress.note(f"note: this client sent {late:.1f} ms late at P99, which is in its latencies")
    status = print_run(run, as_json, str(out))
    if other and not as_json:
        print_tables([side_by_side(run, other)], standard_output())
    return status
