"""Damages model folders and GGUF files at random, by a seed, and reads them under a limit of time and of memory."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import struct
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from test_weights import save_bin, save_gguf
from tiny_models import tiny_model

from engine.executor.weights import load_weights
from engine.model.config import load_model_config
from traces.errors import TandemError

LIMIT_S, LIMIT_BYTES, LIMIT_TEXT = 2.0, 500 * 2**20, 1000
COUNTS = [0, 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**64 - 1]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 1.5, -0.0, 1e300, 1e-320, float("nan"), float("inf")),
    *("", "x", "32", "llama", "linear", "llama3", "\ud800", "\x00", "é" * 10_000, [], [[]], [None], ["x"], [-1]),
    *([2**70], {}, {"x": {}}, {"type": "linear", "factor": "2"}, {"rope_type": "llama3"}, {"rope_type": []}),
]
TEXTS: list[bytes] = [
    *(b"", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}", b"null"),
    *(
        b'"\\ud800"',
        b"\xff\xfe{\x00}\x00",
        b"{} {}",
        b'{"\\ud800": "\\ud800"}',
        b"\x00" * 1000,
        b"NaN",
        b'{"x": 1e999}',
    ),
]
FILES = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "config.json"]


class Case(NamedTuple):
    """What came of a damaged model: how the damage was done, the message or None, and what reading took."""

    damage: str
    message: str | None
    seconds: float
    bytes: int

    @property
    def fault(self) -> str | None:
        """What is wrong with how it ended."""
        if self.message is not None and not (self.message.isprintable() and len(self.message) < LIMIT_TEXT):
            return f"{self.damage}: {self.message}"
        if self.seconds > LIMIT_S or self.bytes > LIMIT_BYTES:
            return f"{self.damage}: took {self.seconds:.1f} s and {self.bytes:,} bytes"
        return None


def save_models(folder: Path) -> list[Path]:
    """A model in every layout."""
    model = tiny_model(vocab_size=31, hidden_size=32, head_dim=16, num_attention_heads=2, num_key_value_heads=1)
    layouts: dict[str, Callable[[Path], object]] = {
        "whole": model.save_pretrained,
        "sharded": lambda path: model.save_pretrained(path, max_shard_size="20KB"),
        "bin": lambda path: save_bin(model, path, 1),
        "shards": lambda path: save_bin(model, path, 2),
        "legacy": lambda path: save_legacy(model, path),
        "gguf": lambda path: save_gguf(model, path / "tiny.gguf"),
    }
    for name, save in layouts.items():
        (folder / name).mkdir()
        save(folder / name)
    return [folder / name for name in layouts]


def save_legacy(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def damage_json(path: Path, draw: random.Random) -> str:
    """Another value for a field of a JSON file, or other text."""
    if draw.random() < 0.3:
        path.write_bytes(draw.choice(TEXTS) if draw.random() < 0.7 else path.read_bytes()[: draw.randrange(300)])
        return f"text of {path.name}"
    try:
        contents = json.loads(path.read_text())
        holder = contents = {**contents}
    except (ValueError, TypeError, RecursionError):  # damaged before
        path.write_bytes(draw.choice(TEXTS))
        return f"text of {path.name} again"
    while inner := [each for each in holder.values() if isinstance(each, dict) and each and draw.random() < 0.6]:
        holder = draw.choice(inner)
    key = draw.choice([*holder, "rope_scaling", "rope_theta", "head_dim", "torch_dtype", "sliding_window"])
    holder[key] = draw.choice(VALUES)
    holder |= {draw.choice(["\ud800", "two\nlines", "long" * 10_000]): 1} if draw.random() < 0.2 else {}
    path.write_text(json.dumps(contents))
    return f"{path.name}: {key} = {str(holder[key])[:40]!r}"


def damage_bytes(path: Path, draw: random.Random) -> str:
    """Other bytes near the beginning of a file, which is where headers are, or a file that is cut off."""
    data = bytearray(path.read_bytes())
    if draw.random() < 0.15:
        path.write_bytes(data[: draw.randrange(len(data))])
        return f"{path.name} cut off"
    width = draw.choice([1, 4, 8])
    at = draw.randrange(min(len(data), draw.choice([40, 400, 4000])) - width) if len(data) > 50 else 0
    value = draw.choice([*COUNTS, draw.getrandbits(64)]) % 2 ** (8 * width)
    data[at : at + width] = value.to_bytes(width, "little")
    path.write_bytes(data)
    return f"{path.name}: {value} in {width} bytes at {at}"


def damage_place(path: Path, draw: random.Random) -> str:
    """Something that is no file in a file's place."""
    path.unlink()
    kind = draw.choice(["nothing", "folder", "pipe", "loop", "device", "huge"])
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("loop", "device"):
        path.symlink_to(path if kind == "loop" else "/dev/zero")
    elif kind == "huge":
        with path.open("wb") as file:
            file.write(struct.pack("<Q", draw.choice(COUNTS)))
            file.truncate(2**33)  # without taking room
    return f"{kind} for {path.name}"


def damage(folder: Path, draw: random.Random) -> str:
    """Damage one file of a model; returns how."""
    whole = sorted(each for each in folder.iterdir() if each.is_file() and each.stat().st_size < 2**24)
    if not whole:
        return "nothing more"
    path = draw.choice(whole)
    if draw.random() < 0.1:
        return damage_place(path, draw)
    return damage_json(path, draw) if path.suffix == ".json" else damage_bytes(path, draw)


def read(folder: Path) -> None:
    """Read a model as a run does."""
    path = folder / "tiny.gguf" if folder.name == "gguf" else folder
    load_weights(path, load_model_config(path), torch.float32, "cpu")


def try_to_read(folder: Path, how: str) -> Case:
    """Read a damaged model; anything but a `TandemError` leaves its traceback for a message."""
    start, before, message = time.perf_counter(), peak_bytes(), None
    signal.setitimer(signal.ITIMER_REAL, 4 * LIMIT_S)
    try:
        read(folder)
    except TandemError as error:
        message = str(error)
    except BaseException:
        message = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return Case(how, message, time.perf_counter() - start, peak_bytes() - before)


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _timeout(*_: object) -> None:
    raise TimeoutError("hangs")


def _try_all(originals: list[Path], scratch: Path, seeds: range, results: Any) -> None:
    signal.signal(signal.SIGALRM, _timeout)
    for seed in seeds:
        draw = random.Random(seed)
        folder = scratch / draw.choice(originals).name
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(originals[0].parent / folder.name, folder)
        how = f"seed {seed}, {folder.name}: " + "; ".join(damage(folder, draw) for _ in range(draw.choice([1, 1, 2])))
        results.send(try_to_read(folder, how))


def fuzz(folder: Path, count: int) -> list[Case]:
    """Damage and read `count` models, in a process of its own whose memory can be watched."""
    originals, context = save_models(folder), get_context("fork")
    results, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try_all, args=(originals, folder / "scratch", range(count), sender))
    process.start()
    sender.close()
    cases = []
    with suppress(EOFError):  # it has ended
        while True:
            cases.append(results.recv())
    process.join()
    return cases
