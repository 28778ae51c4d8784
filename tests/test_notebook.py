"""The functions for notebooks: what they give is what the command line gives, and mistakes are one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from analysis.notebook import (
    TandemError,
    Trace,
    assign_arrivals,
    compare,
    compare_policies,
    read_run,
    simulate,
    synthetic,
)
from engine.scheduler.policies.fcfs import Fcfs
from sim.profile.format import shipped_profiles

KINDS = ("prefill", "decode", "mixed")
GOLDEN = Path(__file__).parent / "golden/h100-llama-3-8b-chunked_prefill-90"


class MostTokensFirst(Fcfs):
    """A policy of the program that runs."""

    def plan(self, now: int) -> None:
        self.decode()
        for request in sorted(self.queue(), key=lambda each: -each.prompt_len):
            self.prefill(request)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return assign_arrivals(synthetic(60, 0, "uniform:50:500", "uniform:5:50"), "poisson", rate=20)


def test_a_run_has_its_metrics_and_frames(trace, tmp_path):
    run = simulate(trace, out=str(tmp_path / "run"))
    again, found = read_run(tmp_path / "run"), run.metrics({"ttft": 100})
    assert len(run.requests) == 60 and len(run.steps) == sum(found[f"steps_{kind}"] for kind in KINDS) > 60
    assert run.requests["ttft_ms"].mean() == pytest.approx(found["mean_ttft_ms"])
    assert found["request_goodput"] > 0
    assert again.requests.equals(run.requests) and again.metrics() == run.metrics()
    assert repr(run).split("\n")[:2] == [
        "chunked_prefill, simulator, NVIDIA H100 80GB HBM3",
        "60 of 60 requests completed",
    ]
    assert len(repr(run).split("\n")) == 3


def test_a_class_is_as_good_as_its_name(trace, capsys):
    fcfs, own = simulate(trace, Fcfs), simulate(trace, MostTokensFirst, max_seqs=4)
    assert fcfs.records.manifest["system"]["scheduler"] == "fcfs"
    assert own.records.manifest["system"]["scheduler"] == f"{__name__}:MostTokensFirst"
    assert own.records.manifest["system"]["max_seqs"] == 4
    assert "4 sequences (given)" in capsys.readouterr().out
    assert compare_policies({"fcfs": fcfs, "own": own})["requests"] == 60


def test_requests_that_do_not_complete_have_no_latency(trace):
    run = simulate(trace, max_model_len=300)
    rejected = run.requests[run.requests["outcome"] == "rejected"]
    assert 0 < len(rejected) < 60 and rejected["ttft_ms"].isna().all()
    assert repr(run).split("\n")[1] == f"{60 - len(rejected)} of 60 requests completed"


def test_a_simulation_is_compared_with_a_real_run(trace, tmp_path):
    real, simulated = read_run(GOLDEN), simulate(trace)
    with pytest.raises(TandemError, match="the simulated one comes first"):
        compare(real, simulated, shipped_profiles()["h100-80gb/llama-3-8b"], tmp_path)
    with pytest.raises(TandemError, match="workload"):
        compare(simulated, real, "h100-80gb/llama-3-8b", tmp_path)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"max_sequences": 4}, "no such limit .*max_seqs"),
        ({"policy": "fcsf"}, "did you mean fcfs"),
        ({"profile": "h1000"}, "profiles that ship"),
    ],
)
def test_a_mistake_is_one_line(trace, asked, said):
    with pytest.raises(TandemError, match=said) as told:
        simulate(trace, **asked)
    assert "\n" not in str(told.value)


def test_a_policy_of_the_running_program_works_and_says_what_is_not_known(tmp_path):
    program = """
from analysis.notebook import simulate, synthetic
from engine.scheduler.policies.fcfs import Fcfs
class Mine(Fcfs): pass
print(simulate(synthetic(9, 0, "fixed:9", "fixed:9"), Mine))
"""
    done = subprocess.run(
        [sys.executable, "-"], input=program, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "note: no other process has the policy" in done.stdout and "9 of 9 requests completed" in done.stdout
