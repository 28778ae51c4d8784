"""Running on other people's machines: batch systems, containers, locales, and disks that say no."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import TANDEM, tandem
from tiny_models import tiny_model

from engine.records.run_folder import RunWriter, read_run
from traces import TandemError, TraceRequest
from traces.outputs import check_writable

IN_A_FILE = {  # a command with everything but --out, whose inputs are not there
    "simulate": "simulate -t none.jsonl -p h200/llama-3-8b",
    "simulate --against": "simulate -t none.jsonl -p h200/llama-3-8b --against sjf",
    "run": "run -t none.jsonl -m none",
    "load": "load --url http://127.0.0.1:9 -t none.jsonl",
    "compare": "compare none none --profile none",
    "compare --rank": "compare --rank none none",
    "validate": "validate -m none",
    "serve": "serve -m none",
    "trace sharegpt": "trace sharegpt --source none.json -m none",
    "trace synthetic": "trace synthetic",
    "trace convert": "trace convert none.csv",
    "trace assign": "trace assign none.csv",
    "trace calibration": "trace calibration -p h200/llama-3-8b",
    "profile": "profile -m none",
    "profile import": "profile import none -m llama-3-8b",
    "profile derive": "profile derive --from none -m llama-3-8b",
    "profile calibrate": "profile calibrate none --from none",
    "bench simulate": "bench simulate -t none.jsonl -p none",
    "bench online": "bench online -t none.jsonl -m none",
    "fidelity measure": "fidelity measure -t none.jsonl -m none",
}


@pytest.mark.parametrize("command", IN_A_FILE.values(), ids=IN_A_FILE)
def test_out_is_tried_before_anything_is_read(command, tmp_path, monkeypatch, capsys):
    from analysis.cli.main import main

    (tmp_path / "file").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tandem", *command.split(), "--out", "file/out.jsonl"])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "file/out.jsonl" in said, said
    assert (tmp_path / "file").read_text() == "in the way" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("path", ["/proc/none/run", "/sys/none", "/dev/null/run"])
def test_a_place_where_nobody_may_write_is_found_out(path):
    with pytest.raises(TandemError, match=f"cannot write {path}: "):
        check_writable(Path(path))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    tiny_model(vocab_size=300).save_pretrained(folder / "model")
    shape = ("--prompt", "fixed:8", "--output", "fixed:4", "--requests", 400, "--arrivals", "uniform", "--rate", 10)
    tandem("trace", "synthetic", *shape, "--out", "t.jsonl", cwd=folder)
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_run_that_is_told_to_end_keeps_what_it_recorded(number, work):
    limits = ("--max-seqs", "4", "--max-model-len", "64", "--threads", "1", "--max-batched-tokens", "64")
    out = f"ended-{number}"
    command = [TANDEM, "run", "-t", "t.jsonl", "-m", "model", *limits, "--kv-blocks", "64", "--out", out]
    with subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE, text=True) as process:
        while "ready" not in (line := process.stderr.readline()) and "limits" not in line and line:
            continue
        time.sleep(4)
        process.send_signal(number)
        time.sleep(0.05)
        if number != signal.SIGINT:
            process.send_signal(number)  # batch systems send it several times
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "marked partial" in said
    run = read_run(work / out)
    assert run.partial and 0 < run.summary["completed"] < 400


def test_two_runs_with_one_out_do_not_write_into_each_others_draft(tmp_path):
    with RunWriter(tmp_path / "run"), RunWriter(tmp_path / "run"):
        assert len(list(tmp_path.iterdir())) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", [["--help"], ["simulate", "--help"], ["trace", "show", "t.jsonl"], ["profile", "list"]]
)
def test_every_locale_can_be_printed_to(command, work):
    poor = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = tandem(*command, cwd=work, env=os.environ | poor)
    assert done.stdout and done.stdout.isascii()


def test_profiles_are_written_and_read_alike_in_every_locale(work):
    poor = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    tandem(
        "profile", "derive", "--from", "h100-80gb/llama-3-8b", "-m", "llama-2-7b", "--out", "poor", cwd=work, env=poor
    )
    tandem("profile", "derive", "--from", "h100-80gb/llama-3-8b", "-m", "llama-2-7b", "--out", "rich", cwd=work)
    assert (work / "poor/meta.yaml").read_bytes() == (work / "rich/meta.yaml").read_bytes()


def test_half_a_character_in_a_client_is_one_line(work):
    with pytest.raises(TandemError, match="lone surrogate"):
        TraceRequest(0, 0, 1, 1, 1, client="a\ud800")
    row = {"arrival_s": 0, "prompt_len": 1, "output_len": 1, "client": "\udc00"}
    (work / "half.jsonl").write_text(json.dumps(row))
    for command in (
        ["trace", "show", "half.jsonl"],
        ["trace", "assign", "t.jsonl", "--class", b"\xff", "-o", "x.jsonl"],
    ):
        done = subprocess.run([TANDEM, *command], cwd=work, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "lone surrogate" in done.stderr
