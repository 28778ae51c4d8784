"""What clients do to a server by mistake or malice: it answers rightly, and nothing of it stays."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
from served import TANDEM, Server, eventually, serving, sim
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from analysis.bench.server_path import steady_profile
from engine.server.host_check import HostCheck
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


# -- bodies ------------------------------------------------------------------------------------------------


def prompt(value: bytes, times: int) -> bytes:
    return b'{"prompt": [' + b",".join([value] * times) + b"]}"


def messages(value: bytes, times: int) -> bytes:
    return b'{"messages": [' + b",".join([value] * times) + b"]}"


MALICE = {
    "a million empty lists": prompt(b"[]", 10**6),
    "a million -1s": prompt(b"-1", 10**6),
    "a million texts in a million lists": prompt(b'["a"]', 10**6),
    "a million prompts": prompt(b'"a"', 10**6),
    "a million booleans": prompt(b"true", 10**6),
    "a million fractions": prompt(b"1.5", 10**6),
    "a million stop strings": b'{"prompt": "x", "stop": ' + prompt(b'"a"', 10**6)[11:],
    "a hundred thousand unknown fields": b"{" + b",".join(b'"%d": 1' % each for each in range(10**5)) + b"}",
    "30,000 unknown fields": b"{" + b",".join(b'"%d": 1' % each for each in range(30_000)) + b"}",
    "a field without effect with 30,000 fields": b'{"prompt": [], "metadata": {'
    + b",".join(b'"%d": 1' % each for each in range(30_000))
    + b"}}",
    "a million messages that are none": messages(b"{}", 10**6),
    "30,000 messages that are none": messages(b"[]", 30_000),
    "10,000 messages": messages(b'{"role": "user", "content": ""}', 10_000),
    "30,000 parts that are none": b'{"messages": [{"role": "user", "content": ' + prompt(b"{}", 30_000)[11:-1] + b"}]}",
    "a number of 5,000 digits": b'{"prompt": "x", "max_tokens": ' + b"1" * 5000 + b"}",
    "a number of 4,000 digits": b'{"prompt": "x", "max_tokens": ' + b"1" * 4000 + b"}",
    "a token id of 4,000 digits": prompt(b"1" * 4000, 1),
    "100,000 brackets": b"[" * 100_000,
    "100,000 objects in each other": b'{"prompt":' * 100_000,
    "a lone surrogate": b'{"prompt": "\\udc00"}',
    "a lone surrogate for a name": b'{"prompt": "x", "\\udc00": 1}',
    "not a number": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "temperature": 1e999}',
    "a field twice": b'{"prompt": "x", "max_tokens": 1, "max_tokens": 2}',
    "a long name": b'{"prompt": "x", "' + "🎉".encode() * 10**6 + b'": 1}',
    "bytes that are no UTF-8": b'{"prompt": "\xc3\x28"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "a text of escapes that is too long": b'{"prompt": "' + b"\\u00e9" * 500_000 + b'"}',
}


@pytest.fixture
def health(server) -> list[float]:
    """Seconds that `/health` takes, asked again and again while the test runs."""
    times, over = [], threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=server.url) as client:
            while not over.is_set():
                begin = time.perf_counter()
                assert client.get("/health").status_code == 200
                times.append(time.perf_counter() - begin)
                time.sleep(0.005)

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: times)
    yield times
    over.set()
    asking.join()


@pytest.mark.parametrize("body", MALICE.values(), ids=MALICE)
def test_a_malicious_body_gets_one_line_at_once_and_holds_nobody_up(server, health, body):
    path = "/v1/chat/completions" if body.startswith(b'{"messages"') else "/v1/completions"
    before, begin = psutil.Process(server.process.pid).memory_info().rss, time.perf_counter()
    answer = server.post(path, content=body, headers={"content-type": "application/json"})
    took_s, message = time.perf_counter() - begin, answer.json()["error"]["message"]
    assert 400 <= answer.status_code < 500 and "\n" not in message and len(message) < 400
    assert took_s < 2 and max(health) < 0.5
    assert psutil.Process(server.process.pid).memory_info().rss - before < 300 * KB * KB


@pytest.mark.parametrize(
    ("headers", "status", "says"),
    [
        ({}, 415, "there is no Content-Type"),
        ({"content-type": "text/plain"}, 415, "'text/plain': send application/json"),  # a web page may send it unasked
        ({"content-type": "application/x-www-form-urlencoded"}, 415, "send application/json"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415, "'gzip': send the body as it is"),
    ],
)
def test_a_body_must_be_said_to_be_json(server, headers, status, says):
    answer = server.post("/v1/completions", content=b'{"prompt": "x", "max_tokens": 1}', headers=headers)
    assert answer.status_code == status and says in answer.json()["error"]["message"]


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "application/x+json"])
def test_json_is_known_by_its_other_names(server, content_type):
    body = b'{"prompt": "x", "max_tokens": 1}'
    assert server.post("/v1/completions", content=body, headers={"content-type": content_type}).status_code == 200


# -- connections -------------------------------------------------------------------------------------------


def exchange(server: Server, *pieces: bytes, half_close: bool = False) -> bytes:
    """What comes back until the server ends the connection."""
    with connect(server) as client, contextlib.suppress(ConnectionError):
        for piece in pieces:
            client.sendall(piece)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        answer = bytearray()
        while data := client.recv(64 * KB):
            answer += data
    return bytes(answer)


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LAST = b'20\r\n{"prompt": "x", "max_tokens": 1}\r\n0\r\n'


@pytest.mark.parametrize(
    "pieces",
    [
        [CHUNKED, b"zz\r\n{}\r\n0\r\n\r\n"],
        [CHUNKED, b"-1\r\n{}\r\n0\r\n\r\n"],
        [CHUNKED, b"f" * 40 + b"\r\n{}\r\n"],
        [CHUNKED, b"1;" + b"x" * 200_000],
        [CHUNKED + LAST + b"X: " + b"y" * 200_000],
        [CHUNKED, LAST, *[b"X: " + b"y" * 1000 + b"\r\n"] * 200],
        [b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000 + b"\r\n\r\n"],
        [b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 40_000 + b"\r\n"],
        [b"GET /" + b"y" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"],
        [HEAD + b"Content-Length: -5\r\n\r\n"],
        [HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n"],
        [HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"],
        [HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"],
        [b"GET * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"],
        [b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n"],
        [b"GET /health HTTP/1.1\r\n\r\n"],
        [b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n"],
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
        [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100],
    ],
    ids=[
        *("bad chunk size", "negative chunk size", "huge chunk size", "long chunk extension", "long trailer at once"),
        *("many trailers", "long header at once", "many headers at once", "long path", "negative length"),
        *("two lengths", "length and chunks", "huge length", "no path", "path of no ASCII", "no host", "CONNECT"),
        *("HTTP/2", "TLS"),
    ],
)
def test_what_is_not_http_or_too_long_gets_an_error_and_the_end_of_its_connection(server, health, pieces):
    begin = time.perf_counter()
    answer = exchange(server, *pieces)
    assert answer == b"" or answer.split(b" ")[1] in (b"400", b"404", b"405", b"413"), answer
    assert time.perf_counter() - begin < 2 and max(health) < 0.5


def test_an_error_of_http_has_the_form_of_all_others(server):
    head, _, body = exchange(server, b"NONSENSE\r\n\r\n").partition(b"\r\n\r\n")
    assert b" 400 Bad Request" in head and json.loads(body)["error"]["code"] == 400


def test_a_client_that_waits_for_100_continue_is_told_to_go_on(server):
    body = b'{"prompt": "x", "max_tokens": 1}'
    with connect(server) as client:
        client.sendall(HEAD + b"Connection: close\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert client.recv(KB).startswith(b"HTTP/1.1 100 ")
        client.sendall(body)
        assert client.recv(KB).startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests_are_answered_in_order(server):
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = exchange(server, request(stream=False, max_tokens=9) + get * 20 + get[:-2] + b"Connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 ") == 22 and answer.index(b'"text"') < answer.index(b'"status"')


def test_an_upgrade_is_declined_and_the_request_answered(server):
    asked = request(stream=False, max_tokens=1).replace(b"\r\n", b"\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n", 1)
    with connect(server) as client:
        client.sendall(asked)
        assert client.recv(KB).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 300])
def test_a_client_that_half_closes_gets_its_answer(server, stream, max_tokens):
    answer = exchange(server, request(stream=stream, max_tokens=max_tokens), half_close=True)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and answer.count(b"HTTP/1.1") == 1
    assert answer.count(b'"finish_reason": "length"' if stream else b'"finish_reason":"length"') == 1


def test_a_client_that_half_closes_within_its_request_is_not_waited_for(server):
    assert exchange(server, request()[:-20], half_close=True) == b""


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_before_it_has_an_answer_is_noticed_within_a_second(server, stream):
    with connect(server) as client:
        client.sendall(request(stream=stream, prompt=[1] * 10, max_tokens=500))
        eventually(lambda: not is_idle(server), 1) if not stream else None
    eventually(lambda: is_idle(server), 0.9)


def test_half_heads_do_not_keep_others_out_and_end_in_time(tmp_path):
    profile = tmp_path / "profile"
    write_profile(steady_profile(2000), profile)
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (200, 300))
    with serving(*sim(profile), preexec_fn=limit) as small:
        assert any("at most 236 connections" in line for line in small.log), "the limit was raised from 200, and said"
        stuck = [connect(small) for _ in range(400)]
        for client in stuck:
            with contextlib.suppress(ConnectionError):
                client.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        begin = time.perf_counter()
        assert small.get("/health", timeout=5).status_code == 200
        assert time.perf_counter() - begin < 1
        stuck[-1].settimeout(15)
        assert stuck[-1].recv(KB).startswith(b"HTTP/1.1 408 ")
        for client in stuck:
            client.close()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(
            (host, 200)
            for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000", "10.1.2.3", "a.localhost")
        ),
        *((host, 403) for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "evil", "", "[::1")),
    ],
)
def test_a_web_page_whose_name_leads_here_is_turned_away(server, host, status):
    answer = exchange(server, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert int(answer.split(b" ")[1]) == status


@pytest.mark.parametrize(
    ("listens_on", "allowed", "host", "allows"),
    [
        ("0.0.0.0", (), b"tandem:8000", True),  # as in a container
        ("0.0.0.0", (), b"evil.example", False),
        ("0.0.0.0", (), socket.gethostname().encode(), True),
        ("127.0.0.1", (), b"tandem:8000", False),
        ("127.0.0.1", ("gpu.example",), b"GPU.example.:80", True),
        ("gpu.example", (), b"gpu.example", True),
        ("127.0.0.1", ("*",), b"whatever.example", True),
    ],
)
def test_a_server_answers_to_the_names_that_it_was_started_for(listens_on, allowed, host, allows):
    assert HostCheck(listens_on, allowed).allows(host) is allows


def test_a_second_ctrl_c_fails_what_is_open_within_a_second(tmp_path):
    profile = tmp_path / "profile"
    write_profile(steady_profile(20_000), profile)
    with serving(*sim(profile), "--kv-blocks", 4000, "--drain", 600) as slow:
        clients = [connect(slow) for _ in range(20)]
        for number, client in enumerate(clients):
            client.sendall(request(stream=number % 2 == 0))
        eventually(lambda: slow.status()["load"]["running"] == 20)
        slow.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        begin = time.perf_counter()
        slow.process.send_signal(signal.SIGINT)
        for client in clients:
            text = bytearray()
            while data := client.recv(64 * KB):
                text += data
            assert b"the server is shutting down" in text
            client.close()
        assert time.perf_counter() - begin < 1
        assert slow.process.wait(5) == 0
