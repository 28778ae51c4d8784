"""What clients do to a server by mistake or malice: it answers rightly, and nothing of it stays."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from served import TANDEM, Server, eventually, serving, sim
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from analysis.bench.server_path import steady_profile
from engine.server.http_protocol import http_protocol
from sim.profile.format import write_profile

KB = 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Server:
    """Steps take 2 ms."""
    profile = tmp_path_factory.mktemp("faults") / "profile"
    write_profile(steady_profile(2000), profile)
    limits = ("--kv-blocks", 4000, "--max-seqs", 256, "--max-model-len", 512)
    with serving(*sim(profile), *limits) as running:
        yield running


def is_idle(server: Server) -> bool:
    status = server.status()
    load = status["load"]
    return not (status["open"] or load["running"] or load["waiting"] or load["kv_blocks_used"])


def request(**fields) -> bytes:
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 500, "stream": True} | fields).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


async def killed_mid_stream(server: Server, clients: int) -> None:
    host, port = server.url.removeprefix("http://").split(":")

    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request())
        await reader.readuntil(b'"text"')
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()  # a reset, as of a client that is killed

    await asyncio.gather(*(one() for _ in range(clients)))


def test_clients_killed_by_the_hundred_leave_no_block_no_request_and_no_memory(server):
    processes = [psutil.Process(server.process.pid), psutil.Process(server.engine_pid)]

    def round_of_kills() -> list[int]:
        asyncio.run(killed_mid_stream(server, 200))
        eventually(lambda: is_idle(server))
        return [process.memory_info().rss for process in processes]

    round_of_kills()
    before = [round_of_kills() for _ in range(2)][-1]
    after = [round_of_kills() for _ in range(5)][-1]
    assert all(late - early < 4 * KB * KB for early, late in zip(before, after, strict=True)), (before, after)


def test_readers_that_never_read_hold_nothing_in_the_engine_stop_nobody_and_lose_nothing(server):
    stuck = []
    for _ in range(4):  # each is owed some 4 MB, more than the sockets between hold
        client = connect(server)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 * KB)
        client.sendall(request(prompt=[[1, 2, 3]] * 60))
        stuck.append(client)
    begin = time.perf_counter()
    assert server.complete(max_tokens=50).json()["usage"]["completion_tokens"] == 50
    assert time.perf_counter() - begin < 8
    eventually(lambda: is_idle(server), 30)
    text = bytearray()
    while b"[DONE]" not in text[-64 * KB :]:
        text += stuck[0].recv(64 * KB)
    assert text.count(b"[DONE]") == 1 and text.count(b'"finish_reason": "length"') == 60
    assert text.count(b" lazy") == 60 * 50, "of 500 tokens each, every tenth"
    for client in stuck:
        client.close()
    eventually(lambda: len(psutil.Process(server.process.pid).net_connections()) < 4)


@pytest.mark.parametrize(
    "flood",
    [
        b"".join(b"X-%d: y\r\n" % number for number in range(200_000)),
        b"X: " + b"y" * 2**21,
        b"\x00\xff\xfe" * 5000,
    ],
    ids=["many headers", "a long header", "no headers at all"],
)
def test_headers_that_never_end_are_cut_off(server, flood):
    with connect(server) as client:
        try:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + flood)
            answer = client.recv(KB)
        except ConnectionError:
            answer = b""
        assert answer == b"" or b" 400 " in answer.split(b"\r\n")[0]
    assert server.get("/health").status_code == 200


def test_without_the_names_that_it_needs_of_uvicorn_the_server_runs_on_h11(monkeypatch):
    assert issubclass(http_protocol(), HttpToolsProtocol)
    monkeypatch.delattr(HttpToolsProtocol, "send_400_response")
    assert http_protocol() == "h11"
    monkeypatch.setitem(sys.modules, "uvicorn.protocols.http.httptools_impl", None)
    assert http_protocol() == "h11"


def test_a_long_request_in_one_piece_is_not_taken_for_a_head(server):
    body = request(prompt="x" * 200_000, stream=False)
    with connect(server) as client:
        client.sendall(body + body)  # the second is pipelined
        assert b" 400 " in client.recv(KB).split(b"\r\n")[0]
    assert "cannot fit" in server.complete(prompt="x" * 300_000).json()["error"]["message"]


def test_a_client_that_promises_a_body_and_leaves_is_forgotten(server):
    for _ in range(50):
        with connect(server) as client:
            client.sendall(request()[:-20])
    assert server.complete(max_tokens=1).status_code == 200
    eventually(lambda: is_idle(server))


@pytest.mark.parametrize("path", ["/v1/../../etc/passwd", "/v1/completions/%2e%2e", "/;id", "/v1/models/$(id)"])
def test_no_path_reaches_anything_but_a_route(server, path):
    with connect(server) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert client.recv(KB).split(b" ")[1] in (b"404", b"405")


def test_schemathesis_finds_no_server_error(server, tmp_path):
    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json"),
            *("--checks", "not_a_server_error", "--max-examples", "15", "--seed", "1", "--no-color"),
            *("--phases", "examples,coverage,fuzzing"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    eventually(lambda: is_idle(server))


def test_ctrl_c_while_the_model_loads_ends_both_processes():
    command = [TANDEM, "serve", "--backend", "real", "--device", "cpu", "--port", "0"]
    # A test run in the background inherits an ignored SIGINT; a user's shell does not hand one down.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    api = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heard)
    eventually(lambda: any("spawn_main" in " ".join(child.cmdline()) for child in api.children()), 30)
    time.sleep(1)  # the engine takes no signals by then
    processes = [api, *api.children()]
    api.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(processes, timeout=30)
    for process in alive:
        process.kill()
    assert not alive and api.returncode == 130
