"""Whether simulation orders policies as hardware does, on runs whose orders, ties and spreads are planted."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console
from test_compare import MS, serve, with_column, with_manifest, workload

from analysis.comparison.ranking import rank
from analysis.metrics.names import RANKED_METRICS
from analysis.metrics.summary import metrics
from analysis.report.study_tables import ranking_sentence, ranking_tables
from analysis.report.tables import print_tables
from engine.records.run_folder import RunRecords
from traces.errors import TandemError


def of(policy: str, backend: str, run: RunRecords) -> RunRecords:
    return with_manifest(with_manifest(run, "system", scheduler=policy), "provenance", backend=backend)


def real(policy: str, scale: float) -> RunRecords:
    return of(policy, "executor", serve(scale))


def sim(policy: str, scale: float) -> RunRecords:
    return of(policy, "simulator", serve(scale))


def runs(*of_policies: RunRecords) -> dict[str, RunRecords]:
    return {f"run-{number}": run for number, run in enumerate(of_policies)}


def orders(ranking: dict, metric: str) -> dict[tuple[str, str], dict]:
    return {(each["first"], each["second"]): each for each in ranking["orders"] if each["metric"] == metric}


def test_every_metric_of_every_pair_is_ordered():
    ranking = rank(
        runs(*(ride(policy, scale) for ride in (real, sim) for policy, scale in (("a", 1), ("b", 1.2), ("c", 1.5))))
    )
    p99 = {"p99_ttft_ms", "p99_tpot_ms", "p99_e2el_ms"}  # not of 40 requests
    assert {each["metric"] for each in ranking["orders"]} == RANKED_METRICS.keys() - p99
    assert set(orders(ranking, "mean_ttft_ms")) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert {each["verdict"] for each in ranking["orders"]} == {"same order"}
    assert ranking["decided"] == ranking["same"] == 3 * len(RANKED_METRICS.keys() - p99)


def test_differences_are_signed_fractions_of_the_firsts_metrics():
    slow, fast, sim_slow, sim_fast = serve(1.3), serve(1), serve(1.2), serve(0.9)
    ranking = rank(
        runs(
            of("slow", "executor", slow),
            of("fast", "executor", fast),
            of("slow", "simulator", sim_slow),
            of("fast", "simulator", sim_fast),
        )
    )
    for metric in ("mean_ttft_ms", "p90_tpot_ms", "p50_e2el_ms", "output_throughput", "mean_normalized_latency_ms"):
        order = orders(ranking, metric)["slow", "fast"]
        assert order["hardware"] == pytest.approx(metrics(fast)[metric] / metrics(slow)[metric] - 1)
        assert order["simulation"] == pytest.approx(metrics(sim_fast)[metric] / metrics(sim_slow)[metric] - 1)
        assert (order["hardware"] > 0) == (metric == "output_throughput")


def test_an_order_that_simulation_has_the_other_way_round_is_found():
    ranking = rank(runs(real("a", 1), real("b", 1.2), sim("a", 1.2), sim("b", 1)))
    assert {each["verdict"] for each in ranking["orders"]} == {"other order"}
    assert (ranking["same"], ranking["decided"]) == (0, len(ranking["orders"]))


def test_a_difference_that_simulation_does_not_see_is_no_order_it_got_right():
    ranking = rank(runs(real("a", 1), real("b", 1.2), sim("a", 1), sim("b", 1)))
    assert ranking["same"] == 0


def test_a_tie_on_hardware_is_a_difference_within_the_spread_and_is_not_judged():
    for repeat, verdict in ((1.005, "same order"), (1.2, "tie on hardware")):
        ranking = rank(runs(real("a", 1), real("a", repeat), real("b", 1.05), sim("a", 1), sim("b", 1.1)))
        order = orders(ranking, "mean_tpot_ms")["a", "b"]
        values = [metrics(serve(scale))["mean_tpot_ms"] for scale in (1, repeat, 1.05)]
        mean = (values[0] + values[1]) / 2
        assert order["spread"] == pytest.approx(abs(values[1] - values[0]) / mean)
        assert order["hardware"] == pytest.approx(values[2] / mean - 1)
        assert order["verdict"] == verdict
        ties = [each["verdict"] for each in ranking["orders"]].count("tie on hardware")
        assert ranking["decided"] == len(ranking["orders"]) - ties


def test_the_larger_spread_of_a_pair_counts_and_who_ran_once_is_given_the_largest():
    repeated = [real("a", 1), real("a", 1.01), real("b", 1.3), real("b", 1.5), real("c", 2)]
    ranking = rank(runs(*repeated, sim("a", 1), sim("b", 1.4), sim("c", 2)))
    table, pairs = ranking["metrics"]["mean_e2el_ms"], orders(ranking, "mean_e2el_ms")
    assert table["c"]["spread"] is None and 0 < table["a"]["spread"] < table["b"]["spread"]
    assert {order["spread"] for order in pairs.values()} == {table["b"]["spread"]}
    assert ranking["policies"] == {"a": 2, "b": 2, "c": 1}


def test_without_repeats_the_spread_is_unknown_and_only_equal_runs_tie():
    ranking = rank(runs(real("a", 1), real("b", 1.001), real("c", 1), sim("a", 1), sim("b", 1.001), sim("c", 1.2)))
    tpot = orders(ranking, "mean_tpot_ms")
    assert {order["spread"] for order in tpot.values()} == {None}
    assert tpot["a", "b"]["verdict"] == "same order"
    assert tpot["a", "c"]["verdict"] == "tie on hardware"


def test_p99_is_ranked_from_200_requests_up():
    many = [
        of(policy, backend, serve(scale, workload(200)))
        for backend in ("executor", "simulator")
        for policy, scale in (("a", 1), ("b", 1.1))
    ]
    assert orders(rank(runs(*many)), "p99_ttft_ms")["a", "b"]["verdict"] == "same order"


def test_runs_that_differ_in_more_than_the_policy_are_refused_by_field_and_run():
    other = with_manifest(real("b", 1), "system", num_blocks=99)
    given = runs(sim("a", 1), sim("b", 1), real("a", 1), other)
    with pytest.raises(
        TandemError, match=r"system\.num_blocks: run-0 60, run-3 99\).*--allow-different system\.num_blocks"
    ):
        rank(given)
    allowed = rank(given, ["system.num_blocks"])
    assert allowed["manifest_differences"] == {"system.num_blocks": {"run-0": 60, "run-3": 99}}


WRONG = {
    "one policy": ([real("a", 1), sim("a", 1)], "all runs are of a"),
    "not simulated": ([real("a", 1), sim("a", 1), real("b", 1)], "b has 1 real, 0 simulated"),
    "not run": ([real("a", 1), sim("a", 1), sim("b", 1)], "b has 0 real, 1 simulated"),
    "simulated twice": (
        [real("a", 1), sim("a", 1), sim("a", 2), real("b", 1), sim("b", 1)],
        "a has 1 real, 2 simulated",
    ),
    "unknown backend": ([real("a", 1), of("b", "abacus", serve())], "run-1: provenance.backend is abacus"),
    "interrupted": ([sim("a", 1), replace(real("a", 1), partial=True)], "run-1 was interrupted"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_runs_that_cannot_be_ranked_are_refused(mistake):
    given, words = WRONG[mistake]
    with pytest.raises(TandemError, match=words) as refusal:
        rank(runs(*given))
    assert "\n" not in str(refusal.value)


def test_policies_that_completed_nothing_have_no_order():
    rejected = serve(requests=workload(prompt_len=500))
    ranking = rank(runs(*(of(policy, backend, rejected) for policy in "ab" for backend in ("executor", "simulator"))))
    assert ranking["orders"] == []
    assert ranking_sentence(ranking) == "Of the 0 orders that hardware decides, simulation got 0 right."
    assert json.loads(json.dumps(ranking, allow_nan=False)) == ranking


def test_orders_of_runs_that_completed_different_requests_are_marked():
    fewer = with_column(serve(1.2), "requests", "outcome", ["cancelled"] * 3 + ["length"] * 37)
    same = rank(runs(real("a", 1), real("b", 1.2), sim("a", 1), sim("b", 1.2)))
    different = rank(runs(real("a", 1), of("b", "executor", fewer), sim("a", 1), sim("b", 1.2)))
    assert "completed" not in printed(same) and " *" not in printed(same)
    before, table = ranking_tables(different)
    assert ("run-1", "37 of 40") in before.rows and "37 completed in all" in before.note
    assert table.rows and all(row[1].endswith(" *") for row in table.rows)


def printed(ranking: dict) -> str:
    output = io.StringIO()
    print_tables(ranking_tables(ranking), Console(file=output, width=80))
    return output.getvalue()


def test_the_tables_align_and_end_with_how_many_orders_are_right():
    late = [ns + 3 * MS for ns in real("b", 1).tables["requests"]["first_token_ns"].to_pylist()]
    second = with_column(real("b", 1.0), "requests", "first_token_ns", late)
    ranking = rank(runs(real("a", 1), real("a", 1.02), second, sim("a", 1), sim("b", 1.2)))
    text = printed(ranking)
    assert "From a to b" in text
    rows = [line.rstrip() for line in text.splitlines() if "%" in line]
    assert len(rows) == len(ranking["orders"])
    assert len({row.index("%") for row in rows if "order" in row.split("%")[0]}) == 1
    assert len({len(row) for row in rows}) == 1 and len(rows[0]) <= 80
    decided, same = ranking["decided"], ranking["same"]
    ties = len(ranking["orders"]) - decided
    assert 0 < same < decided and ties > 1
    said = f"Of the {decided} orders that hardware decides ({ties} more are ties on hardware), "
    assert " ".join(text.split()).endswith(f"{said}simulation got {same} right.")
