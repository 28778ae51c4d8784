"""Recorded runs of a real GPU: without one, the simulator must still decide as it did, step for step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from engine.manifest import config_of
from engine.records import RunRecords, read_run
from sim.simulate import replay

RUNS = sorted(path.parent for path in (Path(__file__).parent / "golden").glob("*/manifest.json"))


@pytest.fixture(params=RUNS, ids=lambda path: path.name)
def run(request) -> RunRecords:
    return read_run(request.param)


def test_the_simulator_decides_as_the_gpu_run_did(run):
    digests = run.tables["steps"]["digest"]
    assert len(digests) > 2000 and run.manifest["provenance"]["backend"] == "executor"
    assert replay(run, config_of(run.manifest)).tables["steps"]["digest"].equals(digests)


def test_another_policy_decides_otherwise(run):
    config = dataclasses.replace(config_of(run.manifest), scheduler="fcfs")
    assert not replay(run, config).tables["steps"]["digest"].equals(run.tables["steps"]["digest"])
