"""Recorded runs of real GPUs: without one, the simulator must still decide as it did, step for step, and take as long.

The runs are of the studies in docs/fidelity.md, and so are the profiles that they are predicted with.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest

from analysis.comparison.compare import closed_loop_errors, compare_decisions, latency_model_errors
from analysis.comparison.runs import common_requests
from analysis.comparison.targets import STUDY_TARGETS
from analysis.metrics.names import COMPARED_STATISTICS, JUDGED_LATENCIES
from engine.records.manifest import config_of
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords, read_run
from sim.profile.format import Profile, read_profile, shipped_profiles
from sim.replay import recorded_requests, replay
from sim.simulate import predict

ROOT = Path(__file__).parents[1]
RUNS = {path.parent.name: path.parent for path in sorted((ROOT / "tests/golden").glob("*/manifest.json"))}
CHUNKED, PREFILL_FIRST = "h100-llama-3-8b-chunked_prefill-90", "h100-llama-3-8b-prefill_first-90"
ON_H200, OF_7B = "h200-llama-3-8b-chunked_prefill-90", "h100-llama-2-7b-chunked_prefill-90"
GPUS = {"NVIDIA H100 80GB HBM3": "h100-80gb", "NVIDIA H200": "h200"}
PAGE = (ROOT / "docs/fidelity.md").read_text()


@pytest.fixture(params=RUNS)
def run(request) -> RunRecords:
    return read_run(RUNS[request.param])


def test_the_simulator_decides_as_the_gpu_run_did(run):
    digests = run.tables["steps"]["digest"]
    assert len(digests) > 2000 and run.manifest["provenance"]["backend"] == "executor"
    assert replay(run, config_of(run.manifest)).records.tables["steps"]["digest"].equals(digests)


def test_another_policy_decides_otherwise(run):
    config = dataclasses.replace(config_of(run.manifest), scheduler="fcfs")
    assert not replay(run, config).records.tables["steps"]["digest"].equals(run.tables["steps"]["digest"])


def profile_for(run: RunRecords) -> Profile:
    gpu, model = GPUS[run.manifest["system"]["device"]], run.manifest["workload"]["model"]
    return read_profile(shipped_profiles()[f"{gpu}/{model}"])


def by_kind(name: str, profile: Profile | None = None) -> dict[str, dict[str, float]]:
    """The latency model's errors on a golden run, with the profile that ships for it or another."""
    run = read_run(RUNS[name])
    replayed = replay(run, config_of(run.manifest), profile or profile_for(run))
    return latency_model_errors(run, replayed.predicted_ns, compare_decisions(run, replayed.records))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        (CHUNKED, {"decode", "mixed"}),
        (PREFILL_FIRST, {"decode", "prefill"}),
        (ON_H200, {"decode", "mixed"}),
        (OF_7B, {"decode", "mixed"}),
    ],
)
def test_the_shipped_profile_predicts_the_steps_of_a_served_load_within_the_targets(name, kinds):
    found = {kind: of for kind, of in by_kind(name).items() if kind in STUDY_TARGETS.model and of["steps"] >= 50}
    assert found.keys() == kinds
    for kind, of in found.items():
        assert of["mape"] <= STUDY_TARGETS.model[kind]


def test_of_all_requests_at_once_steps_are_within_the_targets_and_as_far_off_as_the_page_says():
    errors = by_kind("h100-llama-3-8b-capacity")
    assert all(errors[kind]["mape"] <= STUDY_TARGETS.model[kind] for kind in ("decode", "mixed"))
    stated = dict(re.findall(r"^\| (\w+), 2,000 at once \| (\S+) %", PAGE, re.MULTILINE))
    assert stated == {kind: f"{100 * errors[kind]['mape']:.1f}" for kind in ("decode", "mixed")}


def closed_loop(name: str) -> dict[str, dict[str, dict[str, float]]]:
    real, recorder = read_run(RUNS[name]), Recorder()
    predict(recorded_requests(real), config_of(real.manifest), profile_for(real), recorder)
    sim = RunRecords(real.manifest, recorder.tables())
    return closed_loop_errors(sim, real, common_requests(sim, real))


def stated_percent(name: str, latency: str) -> float:
    """The error of a case's mean that the page states, of a `Closed loop` table: the first number with a sign."""
    *_, policy, load = name.split("-")
    table = PAGE.split(f"Closed loop: {latency}:")[1]
    return float(re.search(rf"{policy} +{load}% +[\d,.]+ ([+-][\d.]+)%", table)[1])


@pytest.mark.parametrize("name", [CHUNKED, PREFILL_FIRST])
def test_a_simulation_on_the_shipped_profile_is_off_by_no_more_than_the_page_says(name):
    errors = closed_loop(name)
    for key, latency in {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2E"}.items():
        assert abs(100 * errors[key]["mean"]["error"]) <= math.ceil(abs(stated_percent(name, latency)))


@pytest.mark.parametrize("name", [CHUNKED, PREFILL_FIRST, ON_H200, OF_7B])
def test_every_latency_is_off_by_less_than_is_allowed(name):
    errors = closed_loop(name)
    for latency in JUDGED_LATENCIES:
        for statistic in COMPARED_STATISTICS:
            assert abs(errors[latency][statistic]["error"]) <= STUDY_TARGETS.of_latency(latency), (latency, statistic)
