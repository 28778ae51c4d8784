"""`tandem bench`: figures are those of the records, rows survive whatever ends it, mistakes get one line."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from rich.console import Console
from test_metrics import records
from tiny_models import tiny_model

from analysis.bench.common import BenchBatch, decode_steps, read_batch, run_benchmark
from analysis.bench.forward import Forward
from analysis.bench.online import scenarios
from analysis.cli.main import main
from analysis.cli.options import listed
from analysis.jobs.options import Limits
from analysis.metrics.summary import request_metrics
from analysis.report.console_progress import ConsoleProgress
from engine.executor.executor import Executor
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords, read_run
from traces.errors import TandemError
from traces.synthetic import synthetic
from traces.trace import write_trace

TANDEM = Path(sys.executable).with_name("tandem")
QUIET = ConsoleProgress(Console(quiet=True))
Tandem = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a tiny model and two traces: 2,000 short requests, 5 requests."""
    folder = tmp_path_factory.mktemp("bench")
    tiny_model(vocab_size=300).save_pretrained(folder / "model")
    write_trace(folder / "t.parquet", synthetic(2000, 0, "uniform:1:8", "uniform:2:4"))
    write_trace(folder / "five.parquet", synthetic(5, 0, "fixed:8", "fixed:2"))
    (folder / "taken").mkdir()
    (folder / "taken/rate-2-seed-0").write_text("something else")
    RunRecords({}, Recorder().tables()).write(folder / "taken/rate-3-seed-0")
    (folder / "there.json").write_text("{}")
    return folder


@pytest.fixture
def tandem(work, monkeypatch, capsys) -> Tandem:
    """Run the command line within this process; returns its status, what it printed, and the lines of its errors."""

    def run(*args: object) -> tuple[int, str, list[str]]:
        monkeypatch.chdir(work)
        monkeypatch.setattr(sys, "argv", ["tandem", "bench", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return end.value.code, said.out, [line for line in said.err.splitlines() if line.strip()]

    return run


class Watched(Executor):
    """Keeps the records of what it serves, and its batches' sizes."""

    def serve(self, requests, config, recorder: Recorder, stop_rule: str = "trace"):
        self.__dict__.setdefault("seen", []).append((len(requests), requests[0].output_len, recorder))
        return super().serve(requests, config, recorder, stop_rule)


def test_forward_prints_a_line_for_each_row_and_keeps_the_json(tandem, work):
    status, printed, _ = tandem(
        "forward", "-m", "model", "--rows", "2x16,1x40", "--outputs", 3, "--repeats", 2, "--out", "forward.json"
    )
    assert status == 0
    cells = re.search(r"^2x16 (.*)$", printed, re.MULTILINE)[1].replace(",", "").split()
    assert len({len(line) for line in printed.splitlines() if "x" in line and "model" not in line}) == 1
    document = json.loads((work / "forward.json").read_text())
    assert not document["partial"] and document["benchmark"] == "forward" and document["model"] == "model"
    assert document["dtype"] == "float32" and document["load_format"] == "auto" and document["system"]["device"]
    limits = {"max_seqs": 2, "max_batched_tokens": 65536, "max_model_len": 44, "pipeline_depth": 2}
    assert document["system"].items() >= limits.items() and document["system"]["scheduler"] == "chunked_prefill"
    provenance = document["provenance"]
    assert provenance["kernels"] and provenance["date"] and provenance["command"].startswith("tandem bench forward")
    assert {"commit", "versions"} <= provenance.keys() and {"torch", "tandem-llm"} <= provenance["versions"].keys()
    assert [(row["row"], row["batch"], row["input_len"]) for row in document["rows"]] == [
        ("2x16", 2, 16),
        ("1x40", 1, 40),
    ]
    first, steps = document["rows"][0], document["rows"][0]["decode_steps"]
    shown = [first[f"{of}{unit}"] for of in ("prefill", "decode") for unit in ("_ms", "_tokens_per_s")]
    shown += [steps["p50_host_us"], steps["p50_device_us"]]
    read = [None if cell == "–" else float(cell) for cell in cells]  # too short to tell
    assert read == [pytest.approx(value, rel=0.01, abs=0.006) for value in shown]
    for row in document["rows"]:
        assert len(row["prefill_walls_ms"]) == len(row["decode_walls_ms"]) == 2 and row["not_measured"] is None
        assert row["decode_steps"]["steps"] == 6
        assert 0 < row["decode_steps"]["p50_host_us"] <= row["decode_steps"]["p99_host_us"]


def test_a_prefill_is_the_wall_of_one_token_and_a_decode_the_difference_shared_out(work):
    executor = Watched(str(work / "model"), threads=1)
    limits = Limits(pipeline_depth=2, max_batched_tokens=40)  # the third request starts, and ends, a step later
    document, _ = run_benchmark(Forward([BenchBatch(3, 20)], 4, 2, limits).on(executor, QUIET))
    row = document["rows"][0]
    walls = {
        outputs: [
            max(recorder.tables()["requests"]["last_token_ns"].to_pylist()) / 1e6
            for size, made, recorder in executor.seen
            if (size, made) == (3, outputs)
        ]
        for outputs in (1, 5)
    }
    assert (row["prefill_walls_ms"], row["decode_walls_ms"]) == (walls[1], walls[5]) and len(walls[5]) == 2
    assert row["prefill_ms"] == median(walls[1])
    assert row["decode_ms"] == pytest.approx((median(walls[5]) - median(walls[1])) / 4)
    assert row["prefill_tokens_per_s"] == pytest.approx(3 * 20 / row["prefill_ms"] * 1e3)
    steps = [
        step for size, made, recorder in executor.seen if made == 5 for step in recorder.tables()["steps"].to_pylist()
    ]
    decodes = [step for step in steps if step["decode_tokens"] == 3 and not step["chunks"]]
    assert len(decodes) == row["decode_steps"]["steps"] == 2 * 3
    host_us = [(step["launched_ns"] - step["scheduled_ns"]) / 1e3 for step in decodes]
    assert row["decode_steps"]["p50_host_us"] == pytest.approx(median(host_us))
    assert row["decode_steps"]["p50_device_us"] == pytest.approx(median(step["device_ns"] / 1e3 for step in decodes))


def test_decode_steps_are_those_near_the_batch_that_prefill_nothing():
    def step(chunks: int, decodes: int, host_us: int, device_us: int) -> dict[str, int]:
        times = {"scheduled_ns": 7000, "launched_ns": 7000 + 1000 * host_us, "device_ns": 1000 * device_us}
        return {"chunks": chunks, "decode_tokens": decodes} | times

    near = [step(0, 64, 10, 1), step(0, 72, 20, 2), step(0, 56, 30, 9)]
    others = [step(0, 73, 99, 99), step(0, 55, 99, 99), step(1, 64, 99, 99)]
    steps = records(steps=[*near, *others]).tables["steps"]
    halves = [steps.slice(0, 1), steps.slice(1)]
    found = decode_steps(halves, 64, 8)
    assert (found["steps"], found["p50_host_us"], found["p50_device_us"]) == (3, 20, 2)
    assert found["p99_host_us"] == pytest.approx(np.percentile([10, 20, 30], 99))
    assert decode_steps(halves, 256, 32) == {"steps": 0} | dict.fromkeys(set(found) - {"steps"})


@pytest.mark.parametrize("kv_blocks", [(), ("--kv-blocks", 40)])
def test_rows_that_memory_does_not_hold_are_reported_and_the_others_measured(tandem, work, kv_blocks):
    few = ("--block-size", 16, "--outputs", 2, "--repeats", 1, "--out", "held.json", "--overwrite")
    few += ("--allow-long-context",)
    status, printed, _ = tandem("forward", "-m", "model", "--rows", "1x2000000000,2x16", *few, *kv_blocks)
    held = "--kv-blocks gives" if kv_blocks else "memory holds"
    assert status == 0 and f"1x2000000000: not measured: needs 125,000,001 KV blocks, more than {held}" in printed
    document = json.loads((work / "held.json").read_text())
    assert document["system"]["max_model_len"] == 16 + 2 + 1
    long, short = document["rows"]
    assert long["not_measured"] and long["prefill_ms"] is None
    assert short["not_measured"] is None and short["prefill_ms"] > 0


def test_rows_beyond_the_models_positions_are_reported_unless_they_are_allowed(tandem):
    few = ("-m", "model", "--rows", "1x254,2x16", "--outputs", 2, "--repeats", 1, "--json")
    document = json.loads(tandem("forward", *few)[1])
    long, short = document["rows"]
    assert long["not_measured"] == "257 tokens are beyond the model's 256 positions: add --allow-long-context"
    assert short["prefill_ms"] > 0 and document["system"]["max_model_len"] == 19
    long, _ = json.loads(tandem("forward", *few, "--allow-long-context")[1])["rows"]
    assert long["not_measured"] is None and long["prefill_ms"] > 0


def test_a_row_that_the_policy_rejects_is_reported_with_its_reason(tandem):
    few = ("--scheduler", "fcfs", "--max-batched-tokens", 64, "--repeats", 1, "--outputs", 1, "--json")
    (row, _) = json.loads(tandem("forward", "-m", "model", "--rows", "2x100,1x8", *few)[1])["rows"]
    assert "2 of 2 requests were not served" in row["not_measured"] and "max_batched_tokens 64" in row["not_measured"]


def test_a_row_whose_steps_run_out_of_memory_is_reported_and_the_next_is_measured(work):
    class Small(Executor):
        def serve(self, requests, *args):
            if requests[0].prompt_len == 99:
                raise TandemError("out of GPU memory in a step of 99 tokens: lower --kv-blocks\nand more")
            return super().serve(requests, *args)

    forward = Forward([BenchBatch(1, 99), BenchBatch(1, 16)], 1, 1, Limits())
    document, failure = run_benchmark(forward.on(Small(str(work / "model"), threads=1), QUIET))
    rows = document["rows"]
    assert failure is None
    assert rows[0]["not_measured"] == "out of GPU memory in a step of 99 tokens: lower --kv-blocks"
    assert rows[1]["decode_ms"] is not None


def test_online_serves_every_rate_and_seed_and_a_burst(tandem, work):
    load = ("--trace", "t.parquet", "--rates", "400,800", "--seconds", 0.25, "--seeds", "0,1", "--all-at-once")
    status, printed, _ = tandem("online", "-m", "model", *load, "--keep", "kept", "--out", "online.json")
    assert status == 0
    for title in ("Served", "TTFT, ms", "TPOT, ms", "E2E, ms", "Per token", "Steps that decode"):
        assert title in printed
    assert (
        len(re.findall(r"^400 req/s ", printed, re.MULTILINE)) == len(re.findall(r"^all at once ", printed, re.M)) == 6
    )
    document = json.loads((work / "online.json").read_text())
    limits = {"max_seqs": 256, "max_batched_tokens": 2048, "max_model_len": 256, "pipeline_depth": 2}
    assert document["system"].items() >= limits.items() and document["system"]["scheduler"] == "chunked_prefill"
    slow, fast, burst = document["rows"]
    assert [(row["rate"], row["requests"]) for row in (slow, fast, burst)] == [(400, 100), (800, 200), (None, 2000)]
    for row, runs in ((slow, 2), (fast, 2), (burst, 1)):
        assert len(row["runs"]) == runs and row["metrics"]["completed"]["mean"] == row["requests"]
        for name, summary in row["runs"].items():
            kept = read_run(work / "kept" / name)
            assert summary.items() <= kept.summary.items() and not kept.partial
            assert kept.manifest["system"]["device"] == document["system"]["device"]
    ttfts = [request_metrics(read_run(work / f"kept/rate-800-seed-{seed}"))["ttft"].mean() for seed in (0, 1)]
    of_row = fast["metrics"]["mean_ttft_ms"]
    assert of_row == pytest.approx({"mean": np.mean(ttfts), "min": min(ttfts), "max": max(ttfts)})
    assert fast["metrics"]["p99_tpot_ms"]["mean"] is not None and slow["metrics"]["p99_tpot_ms"]["mean"] is None
    assert burst["decode_steps"]["256"].keys() == burst["decode_steps"]["64"].keys()


def test_seeds_differ_in_arrivals_and_share_the_lengths_of_the_trace_in_its_order():
    trace = synthetic(60, 5, "uniform:1:500", "uniform:1:500")
    one, other = scenarios(trace, [10.0], [3, 4], 5, False)[0].traces.values()
    assert [each.arrival_ns for each in one.requests] != [each.arrival_ns for each in other.requests]
    assert one.requests[-1].arrival_ns == other.requests[-1].arrival_ns == 5 * 10**9
    lengths = [[(each.prompt_len, each.output_len) for each in of.requests] for of in (one, other, trace)]
    assert lengths[0] == lengths[1] == lengths[2][:50]


def test_online_prints_json_alone_on_standard_output_and_without_keep_leaves_nothing(tandem, work):
    before = set(work.iterdir())
    load = ("-t", "five.parquet", "--rates", 50, "--seconds", 0.1, "--seeds", 7)
    (row,) = json.loads(tandem("online", "-m", "model", *load, "--json")[1])["rows"]
    assert row["row"] == "50 req/s" and list(row["runs"]) == ["rate-50-seed-7"]
    assert row["metrics"]["completed"]["mean"] == 5 and set(work.iterdir()) == before


def test_online_says_first_whom_it_did_not_serve_and_why(tandem):
    load = ("-t", "five.parquet", "--rates", 50, "--seconds", 0.1, "--seeds", 7)
    _, printed, _ = tandem("online", "-m", "model", *load, "--max-model-len", 9, "--max-batched-tokens", 256)
    said = " ".join(printed.split())
    assert "rate-50-seed-7: 5 of 5 requests were rejected: prompt + max_tokens above --max-model-len (9)" in said
    assert said.index("No request completed: there are no latencies.") < said.index("Served (mean over seeds")
    assert "TTFT" not in said, "a table of what is not there"


def interrupted(work: Path, shown: bytes, *args: object) -> tuple[str, dict]:
    """Start a benchmark, press Ctrl-C once its progress shows `shown`; returns what it printed and its JSON."""
    ours, its = pty.openpty()  # progress is drawn on a terminal only
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    # A test run in the background inherits an ignored SIGINT; a user's shell does not hand one down.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    command = [TANDEM, "bench", *map(str, args), "--model", "model", "--threads", "1"]
    command += ["--out", "cut.json", "--overwrite"]
    process = subprocess.Popen(
        command,
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=its,
        text=True,
        env=environment,
        preexec_fn=heard,  # noqa: PLW1509
    )
    os.close(its)
    seen = b""
    while not re.search(shown, seen):  # an end of the terminal before that is an error
        seen += os.read(ours, 1000)
    process.send_signal(signal.SIGINT)
    with suppress(OSError):  # the end of the terminal
        while said := os.read(ours, 1000):
            seen += said
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, seen
    return printed, json.loads((work / "cut.json").read_text())


def test_ctrl_c_keeps_the_rows_so_far(work):
    printed, document = interrupted(work, rb"[1-9]\d*/200000", "forward", "--rows", "1x16,1x8", "--repeats", 100_000)
    (row,) = document["rows"]
    assert document["partial"] and 0 < len(row["decode_walls_ms"]) < 100_000
    assert ", partial" in printed and re.search(r"^1x16 +\d", printed, re.MULTILINE)


def test_ctrl_c_keeps_the_seeds_so_far_and_the_records_of_the_one_that_ran(work):
    load = ("--trace", "t.parquet", "--rates", "100", "--seconds", 0.5, "--seeds", ",".join(map(str, range(100))))
    printed, document = interrupted(work, rb"rate-100-seed-1:", "online", *load, "--keep", "half")
    (row,) = document["rows"]
    assert document["partial"] and list(row["runs"]) == ["rate-100-seed-0"]
    assert row["runs"]["rate-100-seed-0"]["completed"] == 50 and "100 req/s" in printed
    assert not read_run(work / "half/rate-100-seed-0").partial


@pytest.mark.parametrize("text", ["3y4", "0x5", "5x0", "x", "3x4x5", "-1x4", "3 x4", "٣x٤"])
def test_a_row_is_two_numbers(text):
    with pytest.raises(TandemError, match="--rows 1x128"):
        listed("--rows", f"1x2,{text}", read_batch, "1x128,8x1024")


ONLINE = ("online", "--model", "model", "--trace", "t.parquet")
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {  # the command, and words that its one line must hold
    "bad row": (("forward", "--rows", "3y4"), "cannot read '3y4'; write, for example, --rows 1x128,8x1024"),
    "no row": (("forward", "--rows", ""), "--rows 1x128"),
    "no output": (("forward", "--outputs", "0"), "--outputs"),
    "budget below batch": (("forward", "--rows", "8x8", "--max-batched-tokens", "4"), "below max_seqs"),
    "unknown scheduler": (("forward", "--scheduler", "lifo"), "choose chunked_prefill, edf, fastserve, fcfs"),
    "no weights": (("forward", "--model", "llama-3-8b"), "--load-format dummy"),
    "no folder": (("forward", "--out", "nowhere/f.json"), "nowhere/f.json"),
    "bad rate": ((*ONLINE, "--rates", "5,fast"), "--rates: cannot read 'fast'; write, for example, --rates 5,10,20"),
    "rate 0": ((*ONLINE, "--rates", "0"), "cannot read '0'"),
    "endless rate": ((*ONLINE, "--rates", "inf"), "cannot read 'inf'"),
    "bad seed": ((*ONLINE, "--seeds", "0,-1"), "--seeds: cannot read '-1'"),
    "trace too short": (
        (*ONLINE, "--rates", "51"),
        "the trace has 2,000 requests, 51 requests a second for 40 s needs 2,040",
    ),
    "trace too short for a burst": (("online", "-t", "five.parquet", "--rates", "", "--all-at-once"), "needs 2,000"),
    "no time": ((*ONLINE, "--rates", "5", "--seconds", "0"), "--seconds"),
    "nothing to serve": ((*ONLINE, "--rates", ""), "--all-at-once"),
    "figures are there": (("forward", "--out", "there.json"), "--overwrite"),
    "runs are there": ((*ONLINE, "--rates", "3", "--keep", "taken"), "taken/rate-3-seed-0 holds a run"),
    "kernels of no dtype": (("kernels", "--dtype", "int4"), "unknown dtype 'int4': choose float32, float16, bfloat16"),
    "no such trace": (("online", "--trace", "none.parquet"), "none.parquet"),
    "keep is something else": ((*ONLINE, "--rates", "2", "--keep", "taken"), "taken/rate-2-seed-0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_clear_line_and_status_2(tandem, mistake):
    args, words = MISTAKES[mistake]
    status, printed, errors = tandem(*args)
    assert status == 2 and printed == ""
    assert len(errors) == 1 and errors[0].startswith("tandem: ") and words in errors[0], errors


def test_simulate_says_what_a_step_costs_and_where_that_goes(tandem, work):
    status, printed, _ = tandem(
        *("simulate", "-t", "t.parquet", "--rates", "500", "-n", 300, "--scale", "3000", "--repeats", 2, "-o", "s.json")
    )
    assert status == 0
    document = json.loads((work / "s.json").read_text())
    rows = {row["row"]: row for row in document["rows"]}
    assert [*rows] == ["300 at 500 req/s", "300 at once", "256 in flight, steady", "3,000 at 500 req/s"]
    assert all(name in printed for name in rows)
    for row in rows.values():
        assert row["seconds"] == pytest.approx(sum(row["of_these"].values()))
        assert row["us_per_step"] == pytest.approx(1e6 * row["seconds"] / row["steps"])
        assert row["timeouts_per_step"] > 1 and 50 < row["peak_mb"] < 500
        assert not row["parts"] or sum(row["parts"].values()) == pytest.approx(1)
    assert rows["3,000 at 500 req/s"]["requests"] == 3000 and not rows["3,000 at 500 req/s"]["parts"]
    assert rows["256 in flight, steady"]["parts"]["scheduler"] > 0.05
    assert 0 < document["start_s"] < 30 and document["system"]["max_seqs"] == 256


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rates", ""), "no load: give --rates"),
        (("--rates", "fast"), "--rates: cannot read 'fast'"),
        (("--scale", "0"), "--scale: cannot read '0'"),
        (("--scheduler", "mine"), "unknown scheduler 'mine'"),
        (("--profile", "none"), "none is not a profile"),
        (("--out", "nowhere/s.json"), "cannot write nowhere/s.json"),
    ],
)
def test_mistakes_in_what_to_simulate_get_one_line(tandem, arguments, said):
    status, _, errors = tandem("simulate", "-t", "t.parquet", *arguments)
    assert status == 2 and len(errors) == 1 and said in errors[0]
