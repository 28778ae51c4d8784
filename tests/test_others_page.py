"""What docs/others.md says of its commands is what they give. Its tables: test_references, test_vllm_oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
from reader import ROOT, follow
from vllm_logs import LISTS

from engine.records.run_folder import read_run
from engine.scheduler import POLICIES

PAGE = ROOT / "docs/others.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, measured: Path) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    follow(PAGE, folder, measured)
    return folder


def summaries(folder: Path, name: str, *policies: str) -> list[dict]:
    return [read_run(folder / name / policy).summary for policy in policies]


def test_rules_of_memory_make_the_difference_it_states(folder):
    ours, sarathi = summaries(folder, "three", "chunked_prefill", "sarathi")
    assert (sarathi["preemptions"], ours["preemptions"]) == (36, 83)
    assert sarathi["mean_ttft_ms"] == pytest.approx(0.96 * ours["mean_ttft_ms"], rel=0.005)


def test_chunked_prefill_is_vllm_with_one_step_in_flight_and_not_with_two(folder):
    ours, theirs = summaries(folder, "three", "chunked_prefill", "vllm")
    assert ours == theirs
    ours, theirs = summaries(folder, "overlapped", "chunked_prefill", "vllm")
    assert theirs["mean_ttft_ms"] == pytest.approx(1.03 * ours["mean_ttft_ms"], rel=0.005)


def test_it_names_every_policy_but_the_classic_ones_and_every_run_of_the_logs():
    text = PAGE.read_text()
    assert all(f"`{name}`" in text for name in POLICIES)
    assert f"holds {len(LISTS)} logs" in text
