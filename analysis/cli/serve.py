"""`tandem serve`, and `tandem replay`, which is its client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from analysis.cli import options
from analysis.cli.output import print_run, progress
from analysis.jobs.options import Limits, Loading
from engine.records.run_folder import check_out, read_run
from traces.errors import TandemError
from traces.trace import read_trace

if TYPE_CHECKING:
    from analysis.jobs.serve import SimService
    from engine.server.app import ServerLimits
    from engine.server.tokenization import Text

app = typer.Typer()


@app.command()
@options.takes_limits()
@options.takes_loading()
def serve(
    limits: Limits,
    loading: Loading,
    backend: Annotated[str, typer.Option(help="real: the executor. sim: the simulator, paced by the clock.")] = "real",
    profile: Annotated[
        Path | None, typer.Option("--profile", "-p", help="For sim: a latency profile, or one that ships.")
    ] = None,
    output_len: Annotated[
        str | None,
        typer.Option(
            help="For sim: where outputs end, as fixed:N, uniform:LOW:HIGH, lognormal:MU:SIGMA; else at max_tokens."
        ),
    ] = None,
    seed: options.Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the run's records there at the end.")] = None,
    overwrite: options.Overwrite = False,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option("--served-model-name", help="What clients call the model.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="TANDEM_API_KEY", help="What /v1 asks for; better given by the environment.")
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(help="Requests without a token before further ones get a 429.", min=1)
    ] = 4096,
    max_body_mb: Annotated[int, typer.Option(help="Longest request body.", min=1)] = 16,
    drain: Annotated[float, typer.Option(help="Seconds that requests may go on once told to stop.", min=0)] = 30,
    ignore_sampling: Annotated[
        bool, typer.Option("--ignore-sampling", help="Take no notice of temperature and the like; else they get a 400.")
    ] = False,
) -> None:
    """Serve an OpenAI-compatible API, by the executor or by the simulator at the wall clock's pace.

    --model gives the tokenizer in either case. Ctrl-C or SIGTERM: no more requests, those that run are finished.
    """
    from analysis.jobs.serve import RealService
    from engine.server.app import ServerLimits
    from engine.server.serve import serve as run_server
    from engine.server.tokenization import load_text

    _check_backend(backend, profile, output_len)
    service: RealService | SimService
    text: Callable[[], Text]
    if profile is None:
        service, text = RealService(loading, limits, out, overwrite), partial(load_text, loading.model)
    else:
        service, text = _simulated(profile, limits, loading.model, output_len, seed, out, overwrite)
    service.check()
    server_limits = ServerLimits("", max_waiting, max_body_mb * 2**20, api_key or None, ignore_sampling)
    run_server(service, text, partial(_named, server_limits, name), host, port, drain, _say)


def _check_backend(backend: str, profile: Path | None, output_len: str | None) -> None:
    if backend not in ("real", "sim"):
        raise TandemError(f"--backend is '{backend}': choose real or sim")
    if backend == "sim" and profile is None:
        raise TandemError("--backend sim needs --profile: a latency profile, or one that ships (tandem profile list)")
    if backend == "real" and (profile is not None or output_len is not None):
        raise TandemError("--profile and --output-len are for --backend sim: an executor has times of its own")


def _simulated(
    profile: Path, limits: Limits, model: str, output_len: str | None, seed: int, out: Path | None, overwrite: bool
) -> tuple[SimService, Callable[[], Text]]:
    """The engine of a simulation needs a few token ids; the tokenizer stays in the API's process."""
    from analysis.jobs.serve import SimService
    from engine.server.tokenization import load_text

    text = load_text(model)
    return SimService(profile, limits, text.filler(), text.vocab_size, output_len, seed, out, overwrite), lambda: text


def _named(limits: ServerLimits, name: str | None, model: str) -> ServerLimits:
    return replace(limits, model=name or model)


def _say(address: str) -> None:
    print(f"tandem serves on {address}", flush=True)


@app.command()
def replay(
    url: Annotated[str, typer.Option(help="The server's address, such as http://127.0.0.1:8000.")],
    trace: options.TracePath,
    out: options.Out,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Its name there; default: the first.")] = None,
    stops: options.Stops = "trace",
    vocab_size: Annotated[
        int, typer.Option(help="Prompts of known length alone: random ids below this.", min=1)
    ] = 1000,
    api_key: Annotated[str | None, typer.Option(envvar="TANDEM_API_KEY", help="If it asks for one.")] = None,
    against: Annotated[Path | None, typer.Option(help="A run of the trace to set the latencies beside.")] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> int:
    """Send a trace to any OpenAI-compatible server, open loop, and write what the client saw as a run.

    Its records are those of a client: requests and chunk times are known, steps are not (`docs/serving.md`).
    The exit status is 1 if no request completed.
    """
    from analysis.client.load_client import find_target
    from analysis.client.records import LATE_MS, side_by_side
    from analysis.jobs.serve import replay_run
    from analysis.report.tables import print_tables

    options.check_stops(stops)
    check_out(out, overwrite)
    workload, other = read_trace(trace), read_run(against) if against else None
    target = find_target(url, model, stops, vocab_size, api_key or None)
    run = replay_run(workload, target, progress)
    run.write(out, overwrite)
    if (late := run.summary["p99_send_lag_ms"]) is not None and late > LATE_MS:
        progress.note(f"note: this client sent {late:.1f} ms late at P99, which is in its latencies")
    names = ("completed", "output_throughput", "mean_ttft_ms", "mean_tpot_ms", "p99_itl_ms")
    status = print_run(run, as_json, str(out), names)
    if other and not as_json:
        print_tables([side_by_side(run, other)], Console())
    return status
