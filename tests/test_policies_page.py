"""What docs/policies.md shows is what happens: its commands run in order, its policy and its figures are theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
from reader import ROOT, blocks, follow

from engine.records.run_folder import read_run
from engine.scheduler import POLICIES
from engine.scheduler.registry import parameters

PAGE = ROOT / "docs/policies.md"


@pytest.fixture(scope="module")
def printed(tmp_path_factory, measured: Path) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("reader")
    (folder / "docs").symlink_to(ROOT / "docs")
    (policy,) = blocks(PAGE, "python")
    (folder / "aging.py").write_text(policy)
    return folder, follow(PAGE, folder, measured)


def test_the_policy_it_shows_is_the_example():
    assert blocks(PAGE, "python") == [(ROOT / "docs/examples/aging.py").read_text()]


def test_the_tables_it_shows_are_those_that_are_printed(printed):
    _, outputs = printed
    lines = [line.split() for text in outputs.values() for line in text.splitlines()]
    shown = [line.split() for text in blocks(PAGE, "text") for line in text.splitlines()]
    assert len(shown) == 7 and all(line in lines for line in shown)


def test_aging_is_between_shortest_first_and_first_come_first_served(printed):
    folder, _ = printed
    aging, sjf, fcfs = (
        read_run(folder / "idea" / name).summary for name in ("aging-ShortestWithAging", "sjf", "chunked_prefill")
    )
    assert sjf["mean_ttft_ms"] < aging["mean_ttft_ms"] < 0.7 * fcfs["mean_ttft_ms"]
    assert fcfs["p99_ttft_ms"] < aging["p99_ttft_ms"] < 0.5 * sjf["p99_ttft_ms"]
    tails = [
        read_run(folder / f"sweep/aging-ShortestWithAging-ms_per_token={each}").summary["p99_ttft_ms"]
        for each in (2, 10, 50)
    ]
    assert tails == sorted(tails)


def test_the_budget_trades_as_it_says(printed):
    folder, _ = printed
    runs = [read_run(folder / f"budgets/chunked_prefill-budget={each}").summary for each in (128, 512, 2048)]
    assert [run["p99_itl_ms"] for run in runs] == sorted(run["p99_itl_ms"] for run in runs)


def test_the_real_run_decided_as_the_simulator_does(printed):
    folder, outputs = printed
    compared = next(text for command, text in outputs.items() if command.startswith("tandem compare"))
    assert "the simulator planned all" in compared and "steps the same" in compared
    assert read_run(folder / "real").manifest["system"]["scheduler"] == "aging:ShortestWithAging"


def test_preempting_by_swap_keeps_promises_that_recomputing_breaks(printed):
    folder, _ = printed
    swapped, recomputed = (read_run(folder / name).summary for name in ("promised/edf", "recomputed"))
    assert recomputed["request_throughput"] < swapped["request_throughput"] * 5 / 6 + 0.1
    assert recomputed["own_slo_attainment"] < 0.5 * swapped["own_slo_attainment"]


def test_a_policy_that_asks_for_a_time_waits_as_long_as_it_says(printed):
    folder, _ = printed
    assert f"The mean TTFT is {read_run(folder / 'gathered').summary['mean_ttft_ms']:.0f} ms" in PAGE.read_text()


def test_it_lists_every_policy_with_its_parameters():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    listed = {
        row.split("`")[1]: set(row.rpartition(" | ")[2].replace("`", "").rstrip("| ").split(", ")) for row in rows
    }
    assert listed == {name: set(parameters(policy)) or {""} for name, policy in POLICIES.items()}
