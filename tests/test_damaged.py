"""Traces, runs and profiles as they are found on disk: damaged ones are one line of error, from whatever reads them.

`TANDEM_FUZZ=3000` damages so many traces, and a tenth as many runs and profiles.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from analysis.cli.main import main
from engine.records.run_folder import read_run
from sim.profile.format import read_profile
from traces import TandemError, read_trace
from traces.sharegpt import conversations

MANY = int(os.environ.get("TANDEM_FUZZ", "200"))
SLOWEST_S, MOST_MB = 20, 500
STRANGE = [None, True, -1, 0, 2**70, 1e300, "", "x", "\ud800", [], [None], [1, "a"], {}, {"a": 1}, 0.5]


def tandem(*args: object) -> tuple[int, str]:
    """The exit status of a command, and what it says on standard error."""
    out, err, before = StringIO(), StringIO(), sys.argv
    sys.argv = ["tandem", *map(str, args)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        return int(end.code or 0), err.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("main returned")


# Traces

LINES = {
    "ours.jsonl": [{"arrival_s": i / 2, "prompt_len": 9, "output_len": 3, "client": "é"} for i in range(6)],
    "mooncake.jsonl": [{"timestamp": i, "input_length": 600, "output_length": 2, "hash_ids": [0, i]} for i in range(6)],
    "bailian.jsonl": [
        {"chat_id": i, "parent_chat_id": -1, "timestamp": i / 3, "input_length": 20, "output_length": 5, "type": "text"}
        | {"turn": 1, "hash_ids": [i, 7]}
        for i in range(6)
    ],
    "llmservingsim.jsonl": [
        {"input_toks": 3, "output_toks": 2, "arrival_time_ns": i, "input_tok_ids": [1, 2, i]} for i in range(6)
    ],
}
TABLES = {
    "azure.csv": ("TIMESTAMP,ContextTokens,GeneratedTokens", "2024-05-10 00:00:0{i}.009930+00:00,{p},7"),
    "burstgpt.csv": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "{i}.0,GPT-4,{p},7,9,API log",
    ),
    "vidur.csv": ("arrived_at,num_prefill_tokens,num_decode_tokens", "{i}.25,{p},7"),
    "splitwise.csv": (
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size",
        "{i},2,0,{i}.5,1,{p},7",
    ),
    "servegen.csv": ("request_id,timestamp,input_tokens,output_tokens", "{i},{i}.5,{p},7"),
    "llmservingsim.tsv": ("input_toks\toutput_toks\tarrival_time_ns", "{p}\t7\t{i}"),
}


def trace_files(folder: Path) -> list[Path]:
    """A file of every format, in every container."""
    for name, rows in LINES.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(lines)
        (folder / f"{name}.gz").write_bytes(gzip.compress(lines.encode()))
        (folder / f"{name}n".replace(".jsonln", ".json")).write_text(json.dumps(rows))
        pq.write_table(pa.Table.from_pylist(rows), folder / name.replace(".jsonl", ".parquet"))
    for name, (header, row) in TABLES.items():
        lines = "\n".join([header, *(row.format(i=i, p=5 + i) for i in range(6))])
        (folder / name).write_text(lines)
        (folder / f"{name}.gz").write_bytes(gzip.compress(lines.encode()))
    shared = [{"conversations": [{"from": "human", "value": "a b c"}, {"role": "assistant", "content": "d"}]}] * 5
    (folder / "sharegpt.json").write_text(json.dumps(shared))
    return sorted(folder.iterdir())


def damage_bytes(content: bytes, dice: random.Random) -> bytes:
    match dice.randrange(5):
        case 0:
            return content[: dice.randrange(len(content))]
        case 1:
            place = dice.randrange(len(content))
            return content[:place] + bytes(dice.randrange(256) for _ in range(3)) + content[place + 3 :]
        case 2:
            place, size = dice.randrange(len(content)), dice.randrange(1, 40)
            return content[:place] + content[place : place + size] + content[place:]
        case 3:
            old, new = dice.choice([(b"1", b"9" * 400), (b"0", b"-0"), (b",", b",,"), (b":", b"")]), b""
            return content.replace(*old, dice.randrange(1, 4)) + new
    lines = content.split(b"\n")
    dice.shuffle(lines)
    return b"\n".join(lines)


def damage_rows(path: Path, dice: random.Random) -> None:
    """One value of one row becomes another, or is gone, in files that hold JSON."""
    rows = json.loads(path.read_text()) if path.suffix == ".json" else [json.loads(e) for e in path.open()]
    row = dice.choice(rows)
    name = dice.choice([*row])
    if dice.random() < 0.3:
        del row[name]
    else:
        row[name] = dice.choice(STRANGE)
    lines = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(lines)


def read(path: Path) -> None:
    if path.name.startswith("sharegpt"):
        list(conversations(path, warn=len))
    else:
        read_trace(path).digest  # noqa: B018


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_a_damaged_trace_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    whole = [(path, path.read_bytes()) for path in trace_files(tmp_path)]
    before_mb, refused = peak_mb(), 0
    for seed in range(MANY):
        dice = random.Random(seed)
        path, content = dice.choice(whole)
        if path.suffix in (".json", ".jsonl") and dice.random() < 0.5:
            path.write_bytes(content)
            damage_rows(path, dice)
        else:
            path.write_bytes(damage_bytes(content, dice))
        start = time.monotonic()
        try:
            read(path)
        except TandemError as error:
            refused += 1
            assert "\n" not in str(error) and path.name in str(error), (seed, error)
        assert time.monotonic() - start < SLOWEST_S, seed
        path.write_bytes(content)
    assert refused > MANY / 3 and peak_mb() - before_mb < MOST_MB


# Runs and profiles


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trace, a profile, a simulated run, and one that passes for a real one."""
    folder = tmp_path_factory.mktemp("whole")
    synthetic = ("--prompt", "uniform:20:300", "--output", "uniform:2:20", "-n", 20, "--rate", 20)
    assert tandem("trace", "synthetic", *synthetic, "-o", folder / "t.jsonl")[0] == 0
    shutil.copytree(Path(__file__).parents[1] / "sim/profiles/h100-80gb/llama-3-8b", folder / "profile")
    how = ("-t", folder / "t.jsonl", "-p", folder / "profile", "--kv-blocks", 400)
    assert tandem("simulate", *how, "-o", folder / "sim")[0] == 0
    shutil.copytree(folder / "sim", folder / "real")
    manifest = json.loads((folder / "real/manifest.json").read_text())
    manifest["provenance"]["backend"] = "executor"
    (folder / "real/manifest.json").write_text(json.dumps(manifest))
    return folder


READERS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "compare": lambda at: ("compare", at / "sim", at / "real", "-p", at / "profile", "-o", at / "cmp"),
    "rank": lambda at: ("compare", "--rank", at / "sim", at / "real"),
    "like": lambda at: ("simulate", "-t", at / "t.jsonl", "-p", at / "profile", "--like", at / "real", "-o", at / "s2"),
    "calibrate": lambda at: ("profile", "calibrate", "--from", at / "profile", at / "real", "-o", at / "p2"),
    "derive": lambda at: ("profile", "derive", "--from", at / "profile", "-m", "llama-2-7b", "-o", at / "p3"),
    "calibration": lambda at: ("trace", "calibration", "-p", at / "profile", "-o", at / "t2.jsonl"),
}


def damage_table(path: Path, dice: random.Random) -> None:
    table = pq.read_table(path)
    name = dice.choice(table.column_names)
    place = table.column_names.index(name)
    match dice.randrange(6):
        case 0:
            table = pa.concat_tables([table, table.slice(0, 1)])
        case 1:
            table = table.slice(0, dice.randrange(2))
        case 2:
            table = table.set_column(place, name, pa.nulls(len(table), table[name].type))
        case 3:
            table = table.set_column(place, name, pa.array([dice.choice(["x", 1e300, [1], True])] * len(table)))
        case 4:
            table = table.drop_columns([name])
        case _:
            numbers = [dice.choice([-1, 2**62, 10**15, 0]), *table[name].to_pylist()[1:]]
            if pa.types.is_integer(table[name].type):
                table = table.set_column(place, name, pa.array(numbers, table[name].type))
    pq.write_table(table, path)


def damage_tree(content: Any, dice: random.Random) -> Any:
    """One entry, at any depth, becomes another, or is gone."""
    if not isinstance(content, dict) or not content or dice.random() < 0.1:
        return dice.choice(STRANGE)
    name = dice.choice([*content])
    if dice.random() < 0.2:
        return {key: value for key, value in content.items() if key != name}
    return content | {name: damage_tree(content[name], dice)}


def damage_file(path: Path, dice: random.Random) -> None:
    kind = dice.random()
    if kind < 0.1:
        path.unlink()
    elif kind < 0.3:
        path.write_bytes(damage_bytes(path.read_bytes(), dice))
    elif path.suffix == ".parquet":
        damage_table(path, dice)
    elif path.suffix == ".json":
        path.write_text(json.dumps(damage_tree(json.loads(path.read_text()), dice)))
    else:
        path.write_text(yaml.safe_dump(damage_tree(yaml.safe_load(path.read_text()), dice)), errors="surrogateescape")


def test_a_damaged_run_or_profile_is_read_or_refused_in_one_line(whole: Path, tmp_path: Path) -> None:
    refused, many = 0, MANY * 3 // 10 if MANY <= 200 else MANY // 10
    before_mb = peak_mb()
    for seed in range(many):
        dice = random.Random(seed)
        at = tmp_path / str(seed)
        shutil.copytree(whole, at)
        reader = dice.choice([*READERS])
        folders = {"compare": ["sim", "real", "profile"], "rank": ["sim", "real"], "like": ["real", "profile"]}
        folder = dice.choice(folders.get(reader, ["profile", "real"] if reader == "calibrate" else ["profile"]))
        path = dice.choice(sorted((at / folder).iterdir()))
        damage_file(path, dice)
        start = time.monotonic()
        status, said = tandem(*READERS[reader](at))
        last = said.strip().rsplit("\n", 1)[-1]
        assert status in (0, 1, 2) and (status < 2 or last.startswith("tandem: ")), (seed, reader, path, said)
        assert time.monotonic() - start < SLOWEST_S, (seed, reader, path)
        refused += status == 2
        shutil.rmtree(at)
    assert refused > many / 3 and peak_mb() - before_mb < MOST_MB


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("trace.jsonl", read_trace),
        ("trace.csv.gz", read_trace),
        ("trace.parquet", read_trace),
        ("manifest.json", lambda path: read_run(path.parent)),
        ("meta.yaml", lambda path: read_profile(path.parent)),
    ],
)
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(name, read, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(TandemError, match=f"{name} is a pipe or a device"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "words"), [("[" * 100_000, "nested too deep"), (f'{{"prompt_len": {"1" * 5000}}}', "too many digits")]
)
def test_what_json_cannot_hold_is_told_in_words_for_users(line, words, tmp_path):
    (tmp_path / "trace.jsonl").write_text(line)
    with pytest.raises(TandemError, match=words):
        read_trace(tmp_path / "trace.jsonl")
