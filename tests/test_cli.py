"""The command line as a user meets it: subprocesses, real files, one clear line for every mistake."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import tiny_model

from engine.records.run_folder import read_run
from sim.profile.format import read_profile, write_profile

TANDEM = Path(sys.executable).with_name("tandem")


def tandem(*args: object, cwd: Path, check: bool = True, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [TANDEM, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False, **options
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def compared(*args: object, cwd: Path) -> dict:
    """What `tandem compare` found, whose exit status says so too."""
    done = tandem("compare", *args, "--json", cwd=cwd, check=False)
    found = json.loads(done.stdout)
    met = found["decisions"]["identical"] and found["requests"] and found["overall"] != "outside"
    assert done.returncode == (0 if met else 1), done.stderr
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a trace, a tiny model and its measured profile, and an A100 roofline."""
    folder = tmp_path_factory.mktemp("work")
    tiny_model(vocab_size=300).save_pretrained(folder / "model")
    shape = ("--prompt", "uniform:4:60", "--output", "uniform:2:30", "--requests", 30, "--rate", 60)
    tandem("trace", "synthetic", *shape, "--out", "t.parquet", cwd=folder)
    limits = ("--max-seqs", 4, "--max-batched-tokens", 128, "--max-model-len", 128)
    tandem("profile", "--model", "model", *limits, "--threads", 1, "--out", "profile", cwd=folder)
    tandem("profile", "--roofline", "a100-80gb", "--model", "llama-3-8b", "--out", "a100", cwd=folder)
    return folder


LIMITS = ("--kv-blocks", 12, "--max-seqs", 4, "--max-batched-tokens", 128, "--max-model-len", 128)


def test_simulate_run_and_compare_work_from_files_to_a_report(work):
    run = ("run", "--trace", "t.parquet", "--model", "model", "--threads", 1, *LIMITS)
    tandem(*run, "--out", "real", cwd=work)
    tandem(*run, "--out", "again", cwd=work)
    simulate = ("simulate", "--trace", "t.parquet", "--profile", "profile", "--like", "real", "--out", "sim")
    summary = json.loads(tandem(*simulate, "--json", cwd=work).stdout)
    assert summary["completed"] == 30 and summary["not_completed"] == []
    seen = read_run(work / "real").manifest["provenance"]["machine"]
    assert seen.keys() == {"cores", "load_average", "steal", "others"}
    compare = ("sim", "real", "--repeat", "again", "--profile", "profile", "--out", "cmp")
    printed = compared(*compare, "--ablate", "host,head", "--ablate", "imbalance", cwd=work)
    assert printed == json.loads((work / "cmp/compare.json").read_text())
    assert printed["decisions"]["identical"] is True
    assert printed["decisions"]["negative_controls"] == {"arrival_moved": True, "step_longer": True}
    assert printed["requests"] == 30 and printed["manifest_differences"] == {}
    assert printed["repeat_spread"]["ttft"]["mean"] is not None
    assert set(printed["closed_loop"]["tpot"]["mean"]) == {"real", "sim", "error"}
    assert printed["attribution"]["sentence"] and printed["attribution"]["kernels"]["steps"] > 50
    assert list(printed["ablation"]) == ["full", "host", "head", "imbalance"]
    assert (work / "cmp/report.html").stat().st_size > 1_000_000  # plotly.js is inside: no network


def test_policies_are_ranked_from_runs_of_both_riders(work):
    policies = ("fcfs", "prefill_first")
    for policy in policies:
        run = ("run", "--trace", "t.parquet", "--model", "model", "--threads", 1, *LIMITS, "--scheduler", policy)
        tandem(*run, "--out", f"{policy}-real", cwd=work)
        simulate = ("simulate", "--trace", "t.parquet", "--profile", "profile", "--like", f"{policy}-real")
        tandem(*simulate, "--out", f"{policy}-sim", cwd=work)
    runs = [f"{policy}-{kind}" for policy in policies for kind in ("real", "sim")]
    done = tandem("compare", "--rank", *runs, "--json", "--out", "ranked", cwd=work)
    ranking = json.loads(done.stdout)
    assert ranking == json.loads((work / "ranked/ranking.json").read_text())
    assert ranking["policies"] == {"fcfs": 1, "prefill_first": 1}
    shown = tandem("compare", "--rank", *reversed(runs), cwd=work).stdout
    assert "From prefill_first to fcfs" in shown and ranking["sentence"] in " ".join(shown.split())


def test_policies_are_simulated_side_by_side_in_one_command(work):
    (work / "longest.py").write_text(
        "from engine.scheduler.policies.sjf import ShortestJobFirst\n"
        "class LongestFirst(ShortestJobFirst):\n"
        "    def key(self, request): return (-request.max_tokens, request.id)\n"
    )
    tandem("trace", "assign", "t.parquet", "--class", "a", "--class", "b:share=2", "-o", "two.parquet", cwd=work)
    simulate = ("simulate", "-t", "two.parquet", "-p", "a100", "--max-seqs", 2, "--scheduler", "longest:LongestFirst")
    policies = ["longest:LongestFirst", "sjf", "chunked_prefill:budget=64"]
    done = tandem(*simulate, "--against", ",".join(policies[1:]), "--out", "side", "--json", cwd=work)
    comparison = json.loads(done.stdout)
    assert comparison == json.loads((work / "side/policies.json").read_text())
    assert comparison["policies"] == policies and comparison["requests"] == 30
    for policy in policies:
        run = read_run(work / "side" / policy.replace(":", "-"))
        assert run.manifest["system"]["scheduler"] == policy
        assert run.summary["mean_e2el_ms"] == comparison["latencies"]["e2el"]["mean"][policy]
    tandem(*simulate, "--out", "longest", cwd=work)
    alone, beside = (read_run(work / name).tables["steps"] for name in ("longest", "side/longest-LongestFirst"))
    assert alone.equals(beside)
    shown = tandem(*simulate, "--against", ",".join(policies[1:]), "--out", "side", "--overwrite", cwd=work).stdout
    assert all(policy in shown for policy in policies) and "By client" in shown and "…" not in shown
    assert (work / "side/policies.html").stat().st_size > 1_000_000  # plotly.js is inside: no network


def test_a_simulation_repeats_to_the_byte(work):
    folders = [work / "one", work / "two"]
    for folder in folders:
        tandem("simulate", "--trace", "t.parquet", "--profile", "a100", "--out", folder, cwd=work)
    for name in ("requests", "steps", "spans", "iterations"):
        one, two = (folder / f"{name}.parquet" for folder in folders)
        assert one.read_bytes() == two.read_bytes()


def test_a_policy_from_the_users_own_file_runs(work):
    (work / "mine.py").write_text(
        "from engine.scheduler.policies.fcfs import Fcfs\nclass Mine(Fcfs):\n    '''The same, under another name.'''\n"
    )
    args = ("simulate", "--trace", "t.parquet", "--profile", "a100")
    tandem(*args, "--scheduler", "mine:Mine", "--out", "mine", cwd=work)
    tandem(*args, "--scheduler", "fcfs", "--out", "fcfs", cwd=work)
    mine, fcfs = (read_run(work / name).tables["steps"] for name in ("mine", "fcfs"))
    assert mine.equals(fcfs)


def test_requests_that_can_never_run_are_rejected_and_recorded_and_the_others_run(work):
    args = ("simulate", "--trace", "t.parquet", "--profile", "a100", "--kv-blocks", 3, "--max-model-len", 60)
    tandem(*args, "--out", "small", cwd=work)
    rows = read_run(work / "small").tables["requests"].to_pylist()
    rejected = [row for row in rows if row["outcome"] == "rejected"]
    assert 0 < len(rejected) < len(rows)
    assert {row["outcome"] for row in rows} == {"rejected", "length"}
    assert all("max_model_len" in row["reason"] or "KV blocks" in row["reason"] for row in rejected)


def test_a_prompt_with_a_token_that_the_model_lacks_is_rejected_by_a_run_and_by_a_simulation_like_it(work):
    prompts = [[5, 6, 7], [5, 300, 7], [8, 9]]  # the model has 300
    lines = [json.dumps({"arrival_s": 0, "prompt_token_ids": ids, "output_len": 4}) for ids in prompts]
    (work / "foreign.jsonl").write_text("\n".join(lines))
    run = ("run", "--trace", "foreign.jsonl", "--model", "model", "--threads", 1, *LIMITS, "--out", "foreign")
    said = tandem(*run, cwd=work).stdout.splitlines()[0]
    assert said.startswith("1 of 3 requests was rejected: tokens that the model lacks, such as 300, for it has 300:")
    like = ("simulate", "--trace", "foreign.jsonl", "--profile", "profile", "--like", "foreign", "--out", "foreignsim")
    tandem(*like, cwd=work)
    for name in ("foreign", "foreignsim"):
        rows = read_run(work / name).tables["requests"].to_pylist()
        assert [row["outcome"] for row in rows] == ["length", "rejected", "length"]
        assert "token id 300" in rows[1]["reason"]


def test_a_policy_that_does_not_chunk_and_rejects_everybody_is_told_what_would_help(work):
    args = ("simulate", "--trace", "t.parquet", "--profile", "a100", "--max-seqs", 4, "--max-batched-tokens", 4)
    done = tandem(*args, "--scheduler", "fcfs", "--out", "unsplit", cwd=work, check=False)
    assert done.returncode == 1 and "take a policy that chunks (`chunked = True`)" in done.stdout
    assert "rejected:" not in tandem(*args, "--scheduler", "chunked_prefill", "--out", "split", cwd=work).stdout


def test_policies_in_files_have_folders_within_that_of_the_comparison(work):
    for folder in ("a", "b"):
        (work / folder).mkdir()
        (work / folder / "p.py").write_text("from engine.scheduler.policies.fcfs import Fcfs\nclass P(Fcfs): pass\n")
    args = ("simulate", "--trace", "t.parquet", "--profile", "a100", "--out", "files")
    tandem(*args, "--scheduler", "./a/p.py:P", "--against", f"{work}/b/p.py:P", cwd=work)
    names = {path.name for path in (work / "files").iterdir()}
    assert names == {
        "a-p.py-P",
        f"{work}/b/p.py:P"[1:].replace("/", "-").replace(":", "-"),
        "policies.json",
        "policies.html",
    }
    clash = tandem(*args, "--scheduler", "./a/p.py:P", "--against", "a/p.py:P", cwd=work, check=False)
    assert clash.returncode == 2 and "would be written to one folder" in clash.stderr


def test_who_was_rejected_is_said_before_any_number_with_the_option_that_helps(work):
    args = ("simulate", "--trace", "t.parquet", "--profile", "a100", "--max-model-len", 60)
    shown = tandem(*args, "--out", "few", cwd=work).stdout
    summary = json.loads(tandem(*args, "--out", "few", "--json", "--overwrite", cwd=work).stdout)
    (first, second, *_) = shown.splitlines()
    assert first.startswith(
        f"{summary['rejected']} of 30 requests were rejected: prompt + max_tokens above --max-model"
    )
    assert second == f"Latencies are of the {summary['completed']} that completed."
    assert "None" not in shown and "P99 is shown from 200 requests up." in shown
    assert [each["requests"] for each in summary["not_completed"]] == [summary["rejected"]]


def test_a_simulation_that_serves_nobody_says_so_has_no_latencies_and_exits_with_1(work):
    args = ("simulate", "--trace", "t.parquet", "--profile", "a100", "--max-model-len", 4)
    done = tandem(*args, "--out", "nobody", cwd=work, check=False)
    assert done.returncode == 1 and done.stdout.startswith("30 of 30 requests were rejected")
    assert "No request completed: there are no latencies." in done.stdout
    assert "None" not in done.stdout and "ttft" not in done.stdout
    assert tandem(*args, "--out", "nobody", "--json", "--overwrite", cwd=work, check=False).returncode == 1
    assert tandem(*args, "--out", "nobodies", "--against", "sjf", cwd=work, check=False).returncode == 1


def test_strict_refuses_to_extrapolate_and_leaves_what_was_there(work):
    tandem("trace", "synthetic", "--requests", 5, "--prompt", "fixed:900", "--out", "wide.parquet", cwd=work)
    tandem("simulate", "-t", "t.parquet", "-p", "a100", "-o", "covered", "--strict", cwd=work)
    before = (work / "covered/steps.parquet").read_bytes()
    limits = (
        "--kv-blocks",
        400,
        "--max-seqs",
        4,
        "--max-batched-tokens",
        128,
        "--max-model-len",
        2000,
        "--allow-long-context",
    )
    long = ("simulate", "-t", "wide.parquet", "-p", "profile", *limits, "--out", "covered", "--overwrite")
    done = tandem(*long, "--strict", cwd=work, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert "--strict, chunked_prefill: beyond the profile: " in done.stderr and "leave out --strict" in done.stderr
    assert (work / "covered/steps.parquet").read_bytes() == before and not list(work.glob("*.tmp"))
    first = tandem(*long, cwd=work).stdout.splitlines()[0]
    assert re.search(r"^Beyond the profile: .*attention [\d.]+ % of its look-ups, [\d.]+ % of the device time", first)


def test_two_simulations_get_a_table_of_their_own_that_says_so(work):
    args = ("simulate", "--trace", "t.parquet", "--profile", "a100", "--max-seqs", 2)
    for policy in ("fcfs", "sjf"):
        tandem(*args, "--scheduler", policy, "--out", f"two-{policy}", cwd=work)
    shown = tandem("compare", "two-fcfs", "two-sjf", "--out", "two", cwd=work).stdout
    assert shown.startswith("Two simulations: nothing here is measured.")
    assert ["system.scheduler", "fcfs", "sjf"] in [line.split() for line in shown.splitlines()]
    assert "Decisions part after" in shown and "MAPE" not in shown
    found = json.loads((work / "two/simulations.json").read_text())
    assert found["manifest_differences"]["system.scheduler"] == {"two-fcfs": "fcfs", "two-sjf": "sjf"}
    ttft = {name: read_run(work / name).summary["mean_ttft_ms"] for name in ("two-fcfs", "two-sjf")}
    assert found["latencies"]["ttft"]["mean"] == pytest.approx(ttft)
    page = (work / "two/simulations.html").read_text()
    assert "Two simulations: nothing here is measured." in page and "Decisions part after" in page
    tandem(*args, "--scheduler", "fcfs", "--out", "two-again", cwd=work)
    same = tandem("compare", "two-fcfs", "two-again", cwd=work).stdout
    assert "steps are decided the same" in same and "with the same limits, policy and profile" in same


def test_the_exit_statuses_are_in_the_help(work):
    assert "Exit status: 0 as asked; 1 asked for and not met" in " ".join(tandem("--help", cwd=work).stdout.split())


def wait_until_shown(terminal: int, pattern: bytes) -> bytes:
    """Read a terminal until it shows `pattern`."""
    shown = b""
    while not re.search(pattern, shown):
        shown += os.read(terminal, 1000)
    return shown


def test_ctrl_c_keeps_what_a_real_run_recorded_and_marks_it_partial(work):
    tandem("trace", "convert", "t.parquet", "--rate", 2, "--out", "slow.parquet", cwd=work)
    command = [TANDEM, "run", "--trace", "slow.parquet", "--model", "model", "--threads", "1", "--out", "cut"]
    ours, its = pty.openpty()  # progress is drawn on a terminal only
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    # A test run in the background inherits an ignored SIGINT; a user's shell does not hand one down.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(command, cwd=work, stderr=its, env=environment, preexec_fn=heard)  # noqa: PLW1509
    os.close(its)
    wait_until_shown(ours, rb"[1-9]/30")
    process.send_signal(signal.SIGINT)
    said = wait_until_shown(ours, rb"marked partial").decode()
    process.wait(timeout=60)
    assert process.returncode == 130, said
    run = read_run(work / "cut")
    assert run.partial and run.summary["partial"]
    assert 0 < run.summary["completed"] < 30
    tandem("simulate", "--trace", "slow.parquet", "--profile", "profile", "--like", "cut", "--out", "cutsim", cwd=work)
    compare = ("cutsim", "cut", "--profile", "profile", "--out", "cutcmp")
    assert compared(*compare, cwd=work)["decisions"]["identical"] is True


@pytest.fixture(scope="module")
def broken(work) -> Path:
    """The same folder, with files in it that are wrong in one way each."""
    (work / "cut.jsonl").write_text('{"arrival_s": 1, "prompt_len": 5, "output_len": 5}\n{"arrival_s": 2, "prom')
    (work / "negative.jsonl").write_text('{"arrival_s": 1, "prompt_len": -5, "output_len": 5}\n')
    (work / "words.jsonl").write_text('{"arrival_s": "soon", "prompt_len": 5, "output_len": 5}\n')
    (work / "gpt2").mkdir()
    (work / "gpt2/config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    (work / "torn").mkdir()
    (work / "torn/config.json").write_bytes((work / "model/config.json").read_bytes())
    (work / "torn/model.safetensors").write_bytes((work / "model/model.safetensors").read_bytes()[:5000])
    (work / "notes").mkdir()
    (work / "notes/thesis.txt").write_text("irreplaceable")
    tandem("trace", "synthetic", "--requests", 5, "--out", "other.parquet", cwd=work)
    for trace in ("t", "other"):
        tandem("simulate", "-t", f"{trace}.parquet", "-p", "a100", "-o", f"run-{trace}", cwd=work)
    for name, backend in (("real", "executor"), ("again", "executor"), ("client", "client")):
        run = read_run(work / "run-t")
        run.manifest["provenance"]["backend"] = backend
        if name == "again":  # no two real runs take the same times
            late = pa.array([ns + 1 for ns in run.tables["steps"]["device_ns"].to_pylist()])
            at = run.tables["steps"].column_names.index("device_ns")
            run.tables = {**run.tables, "steps": run.tables["steps"].set_column(at, "device_ns", late)}
        run.write(work / f"{name}-t")
    shutil.copytree(work / "real-t", work / "copy-t")
    for copy in ("runs/sjf", "validated/repeat-1"):
        shutil.copytree(work / "run-t", work / copy)
    for result in ("study/policies.json", "compared/compare.json", "figures.json"):
        (work / result).parent.mkdir(exist_ok=True)
        (work / result).write_text("{}")
    profile = read_profile(work / "a100")
    write_profile(profile, work / "nan")
    write_profile(replace(profile, meta=replace(profile.meta, memory=None)), work / "no-memory")
    table = profile.tables["head"]
    table[0]["time_us"] = float("nan")
    pq.write_table(pa.Table.from_pylist(table), work / "nan/head.parquet")
    return work


SIMULATE = ("simulate", "--profile", "a100", "--out", "x")
REAL = ("run", "--trace", "t.parquet", "--out", "x")
BEYOND, KEPT = "--allow-long-context", "--overwrite"
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {  # the command, and words that its one line must hold
    "missing trace": ((*SIMULATE, "--trace", "none.parquet"), "none.parquet"),
    "truncated trace": ((*SIMULATE, "--trace", "cut.jsonl"), "cut.jsonl:2"),
    "negative length": ((*SIMULATE, "--trace", "negative.jsonl"), "negative.jsonl:1"),
    "time that is no number": ((*SIMULATE, "--trace", "words.jsonl"), "words.jsonl:1"),
    "unknown scheduler": ((*SIMULATE, "-t", "t.parquet", "-s", "lifo"), "choose chunked_prefill, edf, fastserve, fcfs"),
    "unknown module": ((*SIMULATE, "-t", "t.parquet", "-s", "nowhere:Mine"), "cannot import nowhere"),
    "unknown policy to compare with": (
        (*SIMULATE, "-t", "t.parquet", "--against", "fcfs,lifo"),
        "unknown scheduler 'lifo'",
    ),
    "unknown parameter": (
        (*SIMULATE, "-t", "t.parquet", "-s", "vtc:lift=1"),
        "no parameter 'lift': it has input_weight",
    ),
    "compare in a run's folder": (
        ("simulate", "-t", "t.parquet", "-p", "a100", "-o", "run-t", "--against", "fcfs"),
        "run-t is a run",
    ),
    "unknown attribute": (("trace", "assign", "t.parquet", "-o", "x", "--class", "a:slo=5"), "no attribute 'slo'"),
    "share of words": (("trace", "assign", "t.parquet", "-o", "x", "--class", "a:share=most"), "share is 'most'"),
    "negative noise": (("trace", "assign", "t.parquet", "-o", "x.jsonl", "--predict", "-1"), "noise is -1.0"),
    "no profile": (("simulate", "-t", "t.parquet", "-p", "none", "-o", "x"), "none is not a profile"),
    "profile with NaN": (("simulate", "-t", "t.parquet", "-p", "nan", "-o", "x"), "time_us is nan"),
    "no such run": ((*SIMULATE, "-t", "t.parquet", "--like", "none"), "none is not a run"),
    "depth 3": ((*SIMULATE, "-t", "t.parquet", "--depth", "3"), "pipeline_depth is 3"),
    "no blocks": ((*SIMULATE, "-t", "t.parquet", "--kv-blocks", "0"), "num_blocks is 0"),
    "budget below batch": (
        (*SIMULATE, "-t", "t.parquet", "--max-seqs", "4", "--max-batched-tokens", "2"),
        "below max_seqs",
    ),
    "beyond the profile's positions": ((*SIMULATE, "-t", "t.parquet", "--max-model-len", "9000"), BEYOND),
    "beyond the model's positions": ((*REAL, "--model", "model", "--max-model-len", "300"), BEYOND),
    "profile beyond positions": (("profile", "--model", "model", "--max-model-len", "300", "--out", "x"), BEYOND),
    "validate beyond positions": (("validate", "--model", "model", "--max-total", "300", "--out", "x"), BEYOND),
    "bench beyond positions": (("bench", "forward", "--model", "model", "--rows", "1x300"), BEYOND),
    "memory beyond positions": (("memory", "h200", "--model", "llama-3-8b", "--max-model-len", "9000"), BEYOND),
    "served beyond positions": (
        ("serve", "--backend", "sim", "-p", "a100", "--max-model-len", "9000"),
        BEYOND,
    ),
    "not a LLaMA": ((*REAL, "--model", "gpt2"), "gpt2"),
    "no such model": ((*REAL, "--model", "nowhere"), "nowhere"),
    "corrupt weights": ((*REAL, "--model", "torn"), "model.safetensors"),
    "no weights": ((*REAL, "--model", "llama-3-8b"), "--load-format dummy"),
    "unknown dtype": ((*REAL, "--model", "model", "--dtype", "int4"), "float32"),
    "unknown stop rule": ((*REAL, "--model", "model", "--stops", "never"), "trace or model"),
    "unknown GPU": (("profile", "--roofline", "abacus", "--model", "llama-3-8b", "--out", "x"), "a100-80gb"),
    "unknown option": (("simulate", "--speed", "high"), "--speed"),
    "option forgotten": (("simulate", "--out", "x"), "--trace"),
    "out holds a run": (("simulate", "-t", "t.parquet", "-p", "a100", "-o", "run-t"), KEPT),
    "real run on a simulated one": (("run", "-t", "t.parquet", "--model", "model", "-o", "run-t"), KEPT),
    "served on a run": (("serve", "--backend", "sim", "-p", "a100", "-o", "run-t"), KEPT),
    "loaded on a run": (("load", "--url", "http://127.0.0.1:1", "-t", "t.parquet", "-o", "run-t"), KEPT),
    "policies on policies": (("simulate", "-t", "t.parquet", "-p", "a100", "-o", "study", "--against", "sjf"), KEPT),
    "policy on its run": (("simulate", "-t", "t.parquet", "-p", "a100", "-o", "runs", "--against", "sjf"), KEPT),
    "validate on a run": (("validate", "--model", "model", "--out", "validated"), KEPT),
    "comparison on another": (("compare", "run-t", "run-t", "-p", "a100", "-o", "compared"), KEPT),
    "profile on a profile": (("profile", "--roofline", "h200", "--model", "llama-3-8b", "--out", "a100"), KEPT),
    "measured on a profile": (("profile", "--model", "model", "--out", "profile"), KEPT),
    "profile on a folder": (
        ("profile", "--roofline", "h200", "--model", "llama-3-8b", "--out", "notes"),
        "not a profile",
    ),
    "derived on its source": (("profile", "derive", "--from", "a100", "--model", "llama-2-7b", "--out", "a100"), KEPT),
    "trace on a trace": (("trace", "convert", "t.parquet", "--out", "t.parquet"), KEPT),
    "drawn on a trace": (("trace", "synthetic", "--out", "t.parquet"), KEPT),
    "figures on others": (("bench", "simulate", "-t", "t.parquet", "-p", "a100", "-o", "figures.json"), KEPT),
    "out is something else": (("simulate", "-t", "t.parquet", "-p", "a100", "-o", "notes"), "not a run"),
    "runs of two traces": (("compare", "run-other", "real-t", "-p", "a100", "-o", "x"), "workload.trace"),
    "simulations of two traces": (("compare", "run-other", "run-t", "-o", "x"), "workload.trace"),
    "compare one run": (("compare", "run-t", "-p", "a100", "-o", "x"), "SIM and REAL, not 1"),
    "real run first": (
        ("compare", "real-t", "run-t", "--repeat", "again-t", "-p", "a100", "-o", "x"),
        "tandem compare run-t real-t --repeat again-t",
    ),
    "two real runs": (
        ("compare", "real-t", "again-t", "-p", "a100", "-o", "x"),
        "tandem compare SIM real-t --repeat again-t",
    ),
    "one run twice": (("compare", "run-t", "./run-t", "-o", "x"), "given twice"),
    "real run as its own repeat": (
        ("compare", "run-t", "real-t", "--repeat", "real-t", "-p", "a100", "-o", "x"),
        "given twice",
    ),
    "copy as repeat": (
        ("compare", "run-t", "real-t", "--repeat", "copy-t", "-p", "a100", "-o", "x"),
        "one and the same run",
    ),
    "simulation as repeat": (
        ("compare", "run-t", "real-t", "--repeat", "run-other", "-p", "a100", "-o", "x"),
        "--repeat run-other is simulated",
    ),
    "a client's run": (("compare", "run-t", "client-t", "-p", "a100", "-o", "x"), "client-t is what a client saw"),
    "simulations with a profile": (("compare", "run-other", "run-t", "-p", "a100", "-o", "x"), "both simulated"),
    "rank a copy": (("compare", "--rank", "run-t", "real-t", "copy-t"), "one and the same run"),
    "compare without profile": (("compare", "run-t", "real-t", "-o", "x"), "--profile"),
    "compare without out": (("compare", "run-t", "real-t", "-p", "a100"), "--out"),
    "unknown term": (
        ("compare", "run-t", "real-t", "-p", "a100", "-o", "x", "--ablate", "host,tail"),
        "host, imbalance, head, graph-padding, power, kv-blocks",
    ),
    "no memory in profile": (
        ("compare", "run-t", "real-t", "-p", "no-memory", "-o", "x", "--ablate", "kv-blocks"),
        "does not say what memory",
    ),
    "rank one policy": (("compare", "--rank", "run-t", "-o", "x"), "chunked_prefill"),
    "rank two traces": (("compare", "--rank", "run-t", "run-other", "-o", "x"), "workload.trace"),
    "rank with a profile": (("compare", "--rank", "run-t", "-p", "a100", "-o", "x"), "no --profile"),
    "like another trace": ((*SIMULATE, "-t", "other.parquet", "--like", "run-t"), "another trace"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_clear_line_status_2_and_leaves_nothing_behind(broken, mistake):
    args, words = MISTAKES[mistake]
    done = tandem(*args, cwd=broken, check=False)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and words in lines[-1], done.stderr
    assert len(lines) == 1 and done.stdout == ""
    assert not (broken / "x").exists() and not list(broken.glob("*.tmp"))
    assert (broken / "notes/thesis.txt").read_text() == "irreplaceable"


def test_nothing_is_overwritten_unless_the_user_says_so(work):
    simulate = ("simulate", "-t", "t.parquet", "-p", "a100", "-o", "once")
    tandem(*simulate, cwd=work)
    before = {path.name: path.read_bytes() for path in (work / "once").iterdir()}
    assert tandem(*simulate, "-s", "fcfs", cwd=work, check=False).returncode == 2
    assert {path.name: path.read_bytes() for path in (work / "once").iterdir()} == before
    tandem(*simulate, "-s", "fcfs", "--overwrite", cwd=work)
    assert read_run(work / "once").manifest["system"]["scheduler"] == "fcfs"
    tandem("trace", "convert", "t.parquet", "--out", "mine.jsonl", cwd=work)
    tandem("trace", "convert", "t.parquet", "--rate", 9, "--out", "mine.jsonl", "--overwrite", cwd=work)
    tandem("profile", "--roofline", "h200", "--model", "llama-2-7b", "--out", "gpu", cwd=work)
    tandem("profile", "--roofline", "h200", "--model", "llama-3-8b", "--out", "gpu", "--overwrite", cwd=work)
    assert read_profile(work / "gpu").model.name == "llama-3-8b"


def test_without_a_command_the_help_is_shown(tmp_path):
    done = tandem(cwd=tmp_path, check=False)
    assert "validate" in done.stdout + done.stderr and "tandem:" not in done.stderr


def test_a_profile_of_another_machine_is_not_silently_used(work):
    simulate = ("simulate", "-t", "t.parquet", "-p", "a100", "-o", "elsewhere", *LIMITS)
    tandem(*simulate, cwd=work)
    tandem("run", "-t", "t.parquet", "-m", "model", "--threads", 1, *LIMITS, "-o", "here", cwd=work)
    compare = ("compare", "elsewhere", "here", "--profile", "a100", "--out", "y")
    done = tandem(*compare, cwd=work, check=False)
    assert done.returncode == 2
    assert "system.device" in done.stderr and "workload.model" in done.stderr and "--allow-different" in done.stderr


def test_a_full_disk_leaves_the_older_run_and_no_debris(work):
    simulate = ("simulate", "--trace", "t.parquet", "--profile", "a100", "--out", "full")
    tandem(*simulate, cwd=work)
    before = (work / "full/steps.parquet").read_bytes()
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # noqa: E731
    done = tandem(*simulate, "--depth", 1, "--overwrite", cwd=work, check=False, preexec_fn=small)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("tandem: cannot write full")
    assert (work / "full/steps.parquet").read_bytes() == before
    assert not list(work.glob("*.tmp"))


def test_two_thousand_requests_fit_in_300_mb(work):
    shape = ("--prompt", "lognormal:4.8:1", "--output", "lognormal:5:0.8", "--requests", 2000, "--rate", 6)
    tandem("trace", "synthetic", *shape, "--out", "long.parquet", cwd=work)
    code = (
        "import re, sys; from analysis.cli.main import main; sys.argv[0] = 'tandem'\n"
        "try: main()\n"
        "finally: print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], 'torch' in sys.modules)"
    )
    args = ["simulate", "--trace", "long.parquet", "--profile", "a100", "--out", "long", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=work, capture_output=True, text=True, check=True)
    kilobytes, torch_loaded = done.stdout.splitlines()[-1].split()
    assert int(kilobytes) < 300_000 and torch_loaded == "False"
