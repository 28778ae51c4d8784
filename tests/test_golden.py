"""Recorded runs of a real GPU: without one, the simulator must still decide as it did, step for step, and take as long.

The runs are of the study in docs/fidelity.md, and so is the profile that they are predicted with.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest

from analysis.compare import closed_loop_errors, common_requests, compare_decisions, latency_model_errors
from analysis.fidelity import MODEL_TARGETS
from engine.manifest import config_of
from engine.recorder import Recorder
from engine.records import RunRecords, read_run
from sim.profile import Profile, read_profile, shipped_profiles
from sim.simulate import predict, recorded_requests, replay

ROOT = Path(__file__).parents[1]
RUNS = {path.parent.name: path.parent for path in sorted((ROOT / "tests/golden").glob("*/manifest.json"))}
SERVED = ("chunked_prefill-90", "prefill_first-90")  # of the study's cases
PAGE = (ROOT / "docs/fidelity.md").read_text()


@pytest.fixture(params=RUNS)
def run(request) -> RunRecords:
    return read_run(RUNS[request.param])


@pytest.fixture(scope="module")
def profile() -> Profile:
    return read_profile(shipped_profiles()["h100-80gb/llama-3-8b"])


def test_the_simulator_decides_as_the_gpu_run_did(run):
    digests = run.tables["steps"]["digest"]
    assert len(digests) > 2000 and run.manifest["provenance"]["backend"] == "executor"
    assert replay(run, config_of(run.manifest)).tables["steps"]["digest"].equals(digests)


def test_another_policy_decides_otherwise(run):
    config = dataclasses.replace(config_of(run.manifest), scheduler="fcfs")
    assert not replay(run, config).tables["steps"]["digest"].equals(run.tables["steps"]["digest"])


def by_kind(name: str, profile: Profile) -> dict[str, dict[str, float]]:
    run = read_run(RUNS[f"h100-llama-3-8b-{name}"])
    replayed = replay(run, config_of(run.manifest), profile)
    return latency_model_errors(run, replayed, compare_decisions(run, replayed))


@pytest.mark.parametrize(
    ("name", "kinds"), [("chunked_prefill-90", {"decode", "mixed"}), ("prefill_first-90", {"decode", "prefill"})]
)
def test_the_shipped_profile_predicts_the_steps_of_a_served_load_within_the_marks(name, kinds, profile):
    found = {kind: of for kind, of in by_kind(name, profile).items() if kind in MODEL_TARGETS and of["steps"] >= 50}
    assert found.keys() == kinds
    for kind, of in found.items():
        assert of["mape"] <= MODEL_TARGETS[kind]


def test_of_all_requests_at_once_mixed_steps_are_just_outside_the_marks_as_the_page_says(profile):
    errors = by_kind("capacity", profile)
    stated = re.search(r"all at once: decode (\S+) %, mixed (\S+) %", PAGE)
    assert [f"{100 * errors[kind]['mape']:.1f}" for kind in ("decode", "mixed")] == list(stated.groups())


def stated_percent(name: str, latency: str) -> float:
    """The error of a case's mean that the page states, of a `Closed loop` table: the first number with a sign."""
    policy, load = name.split("-")
    table = PAGE.split(f"Closed loop: {latency}:")[1]
    return float(re.search(rf"{policy} +{load}% +[\d,.]+ ([+-][\d.]+)%", table)[1])


@pytest.mark.parametrize("name", SERVED)
def test_a_simulation_on_the_shipped_profile_is_off_by_no_more_than_the_page_says(name, profile):
    real, recorder = read_run(RUNS[f"h100-llama-3-8b-{name}"]), Recorder()
    predict(recorded_requests(real), config_of(real.manifest), profile, recorder)
    sim = RunRecords(real.manifest, recorder.tables())
    errors = closed_loop_errors(sim, real, common_requests(sim, real))
    for key, latency in {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2E"}.items():
        assert abs(100 * errors[key]["mean"]["error"]) <= math.ceil(abs(stated_percent(name, latency)))
