"""A server to test: `tandem serve` as a user starts it, in processes of its own, on a free port."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import httpx
import psutil

from engine.executor.tokenizer import load_tokenizer, smollm2_path

TANDEM = Path(sys.executable).with_name("tandem")
PROFILE = "a100-80gb/llama-3-8b"  # a decode step takes 12 ms
MODEL = "llama-3-8b"
START_S = 120


@cache
def tokenizer() -> str:
    """SmolLM2's tokenizer as a folder, which is read in a fraction of the time that its GGUF file takes."""
    folder = tempfile.mkdtemp(prefix="tandem-tokenizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    load_tokenizer(smollm2_path()).save_pretrained(folder)
    return folder


def sim(profile: object = PROFILE) -> tuple[object, ...]:
    """Options for a simulated server."""
    return "--backend", "sim", "--profile", profile, "--model", tokenizer()


class Server:
    """A running server; `more` as in `subprocess.Popen`."""

    def __init__(self, *options: object, env: dict[str, str] | None = None, **more) -> None:
        self.process = subprocess.Popen(
            [TANDEM, "serve", "--port", "0", *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | (env or {}),
            **more,
        )
        self.log: list[str] = []
        self.url = self._wait_for_address()

    def _wait_for_address(self) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            self.log.append(line)
            if found := re.search(r"serves on (http\S+)", line):
                return found[1]
        raise AssertionError(f"it ended, status {self.process.wait()}: {''.join(self.log)}")

    def get(self, path: str, **options) -> httpx.Response:
        return httpx.get(self.url + path, **options)

    def post(self, path: str, body: object = None, **options) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def complete(self, **fields) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": "Once upon a time"} | fields)

    def status(self) -> dict:
        return self.get("/status").json()

    @property
    def engine_pid(self) -> int:
        children = psutil.Process(self.process.pid).children()
        (engine,) = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        return engine.pid

    def stop(self, how: int = signal.SIGINT, timeout_s: float = 60) -> int:
        self.process.send_signal(how)
        self.log.append(self.process.communicate(timeout=timeout_s)[0])
        return self.process.returncode


@contextmanager
def serving(*options: object, **more) -> Iterator[Server]:
    server = Server(*options, **more)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            try:
                server.stop()
            except subprocess.TimeoutExpired:
                server.process.kill()
                raise


def eventually(condition: Callable[[], object], timeout_s: float = 10) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.01)
