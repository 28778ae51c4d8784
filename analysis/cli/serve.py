"""`tandem serve`, and `tandem load`, which is its client."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from analysis.cli import options
from analysis.cli.options import Commands, but, option
from analysis.cli.output import print_run, progress, read_noted
from analysis.jobs.options import Limits, Loading, RunOptions, TraceReading
from analysis.jobs.progress import Progress
from engine.records.run_folder import check_out, read_run
from traces.errors import TandemError

app = Commands()


@app.command()
def serve(
    loading: Loading,
    limits: Limits,
    backend: Annotated[str, option("real: the executor. sim: the simulator, paced by the clock.")] = "real",
    profile: Annotated[Path | None, option(options.A_PROFILE, "--profile", "-p")] = None,
    output_len: Annotated[
        str | None, option("For sim: output lengths as fixed:N, uniform:LOW:HIGH, lognormal:MU:SIGMA; else max_tokens.")
    ] = None,
    seed: options.Seed = 0,
    out: Annotated[Path | None, option("Write the run's records there at the end.", "--out", "-o")] = None,
    overwrite: options.Overwrite = False,
    host: Annotated[str, option("Where to listen; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, option("0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, option("What clients call the model.", "--served-model-name")] = None,
    api_key: options.ApiKey = None,
    max_waiting: Annotated[int, option("Requests without a token before further ones get a 429.", min=1)] = 4096,
    max_body_mb: Annotated[int, option("Longest request body.", min=1)] = 16,
    drain: Annotated[float, option("Seconds that requests may go on once told to stop.", min=0)] = 30,
    ignore_sampling: Annotated[bool, option("No 400 for temperature and the like.", "--ignore-sampling")] = False,
) -> None:
    """Serve an OpenAI-compatible API, by the executor or by the simulator at the wall clock's pace.

    --model gives the tokenizer in either case. Ctrl-C or SIGTERM: no more requests, those that run are finished.
    """
    from analysis.jobs.serve import RealService, SimService
    from engine.server.app import ServerLimits
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

    def server_limits(model: str) -> ServerLimits:
        return ServerLimits(name or model, max_waiting, max_body_mb * 2**20, api_key or None, ignore_sampling)

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


@app.command()
def load(
    how: Annotated[RunOptions, but("check", "strict")],
    reading: TraceReading,
    url: Annotated[str, option("The server's address, such as http://127.0.0.1:8000.")],
    trace: options.TracePath,
    out: options.Out,
    model: Annotated[str | None, option("Its name there; default: the first.", "--model", "-m")] = None,
    vocab_size: Annotated[int, option("Prompts of known length alone: random ids below this.", min=1)] = 1000,
    api_key: options.ApiKey = None,
    against: Annotated[Path | None, option("A run of the trace to set the latencies beside.")] = None,
    as_json: options.AsJson = False,
) -> int:
    """Send a trace to any OpenAI-compatible server, open loop, and record the client's view as a run.

    Its records are those of a client: requests and chunk times are known, steps are not (`docs/serving.md`).
    The exit status is 1 if no request completed.
    """
    from analysis.client.load_client import find_target
    from analysis.client.records import LATE_MS, load_run, side_by_side
    from analysis.report.tables import print_tables

    check_out(out, how.overwrite)
    workload, other = read_noted(trace, reading), read_run(against) if against else None
    target = find_target(url, model, how.stop_rule, vocab_size, api_key or None)
    run = load_run(workload, target, progress)
    run.write(out, how.overwrite)
    if (late := run.summary["p99_send_lag_ms"]) is not None and late > LATE_MS:
        progress.note(f"note: this client sent {late:.1f} ms late at P99, which is in its latencies")
    names = ("completed", "output_throughput", "mean_ttft_ms", "mean_tpot_ms", "p99_itl_ms")
    status = print_run(run, as_json, str(out), names)
    if other and not as_json:
        print_tables([side_by_side(run, other)], Console())
    return status
