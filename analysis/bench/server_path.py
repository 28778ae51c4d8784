"""Times the server's path, from the moment the engine knows a token to the moment a client has it.

The engine is a simulation whose steps all take the same time. So the load is exactly so many streams of so many tokens
a second. Server, engine and client are processes of this machine, and share its clock.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop

from analysis.bench.common import TANDEM, Benchmark, Row
from analysis.client.load_client import Reply, Sent, Target, find_target, send_all
from analysis.jobs.progress import Progress
from analysis.metrics.columns import Ints
from analysis.metrics.tokens import token_times
from analysis.report.tables import TextTable
from engine.model.config import load_model_config
from engine.records import manifest
from engine.records.run_folder import RunRecords, read_run
from engine.server.tokenization import Text, load_text
from sim.profile.format import HOST_TERMS, Points, Profile, rows_of, write_profile
from sim.profile.meta import ProfileMeta
from traces.errors import TandemError
from traces.request import TraceRequest

DEVICE = "a device of even steps"
PROMPT, BLOCK = 8, 16
RAMP_SHARE = 0.4  # of a stream's life, over which the streams begin
NAP_S = 0.001
STATISTICS = ("mean", "p50", "p99", "max")
PROCESSES = ("api", "engine", "client")
COLUMNS = ("streams", "tokens/s each", "tokens/s", "whole", *STATISTICS, "API", "engine", "client")
HOW = (
    "Tokens/s: while all streams ran. Whole: streams that had exactly their text, their count and one end. Mean to "
    "max: ms from the engine's notice of a token to the client's. API, engine, client: processors kept busy."
)


@dataclass(frozen=True, slots=True)
class Offered:
    """A load: so many streams at once, of `rate` tokens a second each, for `seconds`."""

    streams: int
    rate: float
    seconds: float

    @property
    def tokens(self) -> int:
        """Of one stream."""
        return max(1, round(self.rate * self.seconds))

    def requests(self) -> list[TraceRequest]:
        """Streams that begin one after the other, then all run."""
        gap_ns = int(RAMP_SHARE * self.seconds * 1e9 / self.streams)
        return [TraceRequest(i, i * gap_ns, PROMPT, self.tokens, self.tokens) for i in range(self.streams)]

    def options(self) -> tuple[object, ...]:
        """Of `tandem serve`, so that all fit at once; no model makes these tokens."""
        longest = PROMPT + self.tokens
        blocks = ("--block-size", BLOCK, "--kv-blocks", self.streams * -(-longest // BLOCK))
        requests = ("--max-seqs", self.streams, "--max-waiting", 2 * self.streams, "--depth", 1)
        tokens = ("--max-batched-tokens", self.streams * PROMPT, "--max-model-len", longest, "--allow-long-context")
        return *blocks, *requests, *tokens


def read_streams(text: str) -> tuple[int, float]:
    """Read STREAMSxRATE. Raises ValueError if it is not a number of 1 or more and one above 0, to 1,000."""
    streams, _, rate = text.partition("x")
    read = int(streams), float(rate)
    if read[0] < 1 or not 0 < read[1] <= 1000:
        raise ValueError(text)
    return read


def server_path(offered: Sequence[Offered], model: str, progress: Progress) -> Benchmark:
    """The benchmark of several loads; `model` gives the tokenizer. Raises TandemError if the server does not start."""
    facts = {"model": model} | manifest.compose(device=DEVICE, backend="simulator")
    return Benchmark("serve", HOW, facts, (_measure(each, model, progress) for each in offered), _tables)


def _measure(offered: Offered, model: str, progress: Progress) -> Row:
    """Serve the load and account for every token."""
    text = load_text(model)
    with tempfile.TemporaryDirectory() as scratch:
        profile, out = Path(scratch) / "profile", Path(scratch) / "run"
        write_profile(steady_profile(1e6 / offered.rate), profile)
        options = ("--backend", "sim", "--profile", profile, "--model", model, "--out", out, "--port", 0)
        command = [*TANDEM, "serve", *map(str, (*options, *offered.options()))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout
            url = server.stdout.readline().rpartition(" ")[2].strip()
            if not url:
                raise TandemError("the server did not start")
            try:
                replies, busy = _send(offered, url, server.pid, progress)
            finally:
                server.send_signal(signal.SIGINT)
                server.wait()
        name = {"row": f"{offered.streams}x{offered.rate:g}"}
        return name | asdict(offered) | _judge(offered, text, read_run(out), replies) | busy


def _send(offered: Offered, url: str, pid: int, progress: Progress) -> tuple[list[Reply], dict[str, float]]:
    """The replies, and the CPU seconds a second of each of `PROCESSES`."""
    target = find_target(url)
    api = psutil.Process(pid)
    (engine,) = [child for child in api.children() if "spawn_main" in " ".join(child.cmdline())]
    processes = dict(zip(PROCESSES, (api, engine, psutil.Process()), strict=True))
    before = {name: sum(each.cpu_times()[:2]) for name, each in processes.items()}
    with progress.bar(f"{offered.streams} streams", offered.streams) as show:
        sent = uvloop.run(_send_and_nap(target, offered.requests(), show))
    if sent.interrupted:
        raise KeyboardInterrupt
    start_ns, replies = sent.start_ns, sent.replies
    wall_s = (max(reply.chunk_ns[-1] for reply in replies if reply.chunk_ns) - start_ns) / 1e9
    busy = {f"{name}_cpu": (sum(each.cpu_times()[:2]) - before[name]) / wall_s for name, each in processes.items()}
    return replies, busy


async def _send_and_nap(target: Target, requests: Sequence[TraceRequest], show: Callable[[int], None]) -> Sent:
    """Send all, and read every `NAP_S` what has come.

    A client that is woken for each chunk costs the server, on the same machine, more for waking it than for the chunk.
    A chunk's wait until the client reads it counts as added.
    """

    async def nap() -> None:
        while True:
            time.sleep(NAP_S)
            await asyncio.sleep(0)

    napping = asyncio.create_task(nap())
    try:
        return await send_all(target, requests, show)
    finally:
        napping.cancel()


def _judge(offered: Offered, text: Text, run: RunRecords, replies: Sequence[Reply]) -> dict[str, Any]:
    """Set each token's arrival at its client against the engine's own record of when it was known."""
    filler = text.filler()
    ids = [filler[place % len(filler)] for place in range(offered.tokens)]
    expected = text.tokens.decode(ids)
    lengths = np.cumsum([len(text.tokens.decode([token])) for token in ids])
    engine_ns = run.manifest["provenance"]["start_perf_ns"]
    times = token_times(run)
    added, received, complete = [], [], 0
    for reply in replies:
        whole = "".join(reply.pieces) == expected and reply.ends == 1 and reply.error is None
        complete += whole and reply.completion_tokens == offered.tokens
        if whole and reply.response_id:
            request_id = int(reply.response_id.rpartition("-")[2]) - 1  # answers are numbered from 1, requests from 0
            known = times.time_ns[np.searchsorted(times.request, request_id) :][: offered.tokens] + engine_ns
            so_far = np.cumsum([len(piece) for piece in reply.pieces])  # a token came with what completed its text
            received.append(np.asarray(reply.chunk_ns, np.int64)[np.searchsorted(so_far, lengths)])
            added.append(received[-1] - known)
    return {
        "tokens": offered.streams * offered.tokens,
        "complete": int(complete),
        "chunks": sum(len(reply.chunk_ns) for reply in replies),
        "tokens_per_s": _plateau(received),
    } | _milliseconds(added)


def _plateau(received: Sequence[Ints]) -> float | None:
    """Tokens a second that came while all streams ran."""
    if not received:
        return None
    begin, end = max(times[0] for times in received), min(times[-1] for times in received)
    tokens = sum(int(np.count_nonzero((times > begin) & (times <= end))) for times in received)
    return tokens / ((end - begin) / 1e9) if end > begin else None


def _milliseconds(added: Sequence[Ints]) -> dict[str, float | None]:
    names = [f"added_{name}_ms" for name in STATISTICS]
    if not added:
        return dict.fromkeys(names)
    ns = np.concatenate(added)
    return dict(zip(names, np.array([ns.mean(), *np.percentile(ns, [50, 99]), ns.max()]) / 1e6, strict=True))


def steady_profile(step_us: float) -> Profile:
    """Every step takes as long, whatever it runs; the host takes no time."""
    model, source = load_model_config(Path("llama-3-8b")), "invented: every step takes the same time"
    meta = ProfileMeta(device=DEVICE, model=model, dtype="float16", source=source, kv_blocks=1, block_size=BLOCK)
    points: dict[str, Points] = {
        "dense": {("all", tokens): step_us for tokens in (1, 2**20)},
        "prefill_attention": {(chunk, context): 0.0 for chunk in (1, 2**20) for context in (0, 2**20)},
        "decode_attention": {(many, many * each, 1): 0.0 for many in (1, 2**16) for each in (1, 2**20)},
        "head": {(samples,): 0.0 for samples in (1, 2**16)},
        "host": {(term, "any", 1): 0.0 for term in HOST_TERMS},
    }
    return Profile(meta, {table: rows_of(table, of) for table, of in points.items()})


def _tables(rows: Sequence[Row]) -> Iterator[TextTable]:
    """One line a load."""
    cells = [
        (
            f"{row['streams']:,}",
            f"{row['rate']:g}",
            f"{row['tokens_per_s'] or 0:,.0f}",
            f"{row['complete']:,}",
            *(f"{row[f'added_{name}_ms'] or 0:.1f}" for name in STATISTICS),
            *(f"{row[f'{name}_cpu']:.2f}" for name in PROCESSES),
        )
        for row in rows
    ]
    yield TextTable("Added by the server's path", HOW, COLUMNS, cells)
