"""What a term of the latency model is worth, on runs that the full model predicts without error."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from shadow import small_profile
from test_attribution import run_on, sparse
from test_compare import CONFIG, MS, with_manifest

from analysis.comparison.ablation import TERMS, read_terms
from analysis.comparison.ablation import ablate as ablate_replayed
from analysis.metrics.columns import step_kinds
from analysis.report.attribution_tables import ablation_tables
from engine.config import ServingConfig
from engine.model.graph_sizes import GraphSizes
from engine.records.manifest import config_of, system
from engine.records.run_folder import RunRecords
from sim.profile.format import Profile
from sim.profile.meta import MemoryFacts
from sim.replay import replay
from traces.errors import TandemError
from traces.request import TraceRequest

MEMORY = MemoryFacts(usable=1000, weights=360, block=10)


def detailed_profile() -> Profile:
    """The small profile, of a machine that captures graphs, minds uneven contexts, and says what memory it has."""
    profile = small_profile()
    rows = [
        {"kind": kind, "rows": x, "time_us": 1200 + 10 * x, "spread": 0.0}
        for kind in ("decode", "mixed")
        for x in (1, 256)
    ]
    uneven = [row | {"imbalance": 2, "time_us": row["time_us"] * 2} for row in profile.tables["decode_attention"]]
    tables = profile.tables | {"graph": rows, "decode_attention": profile.tables["decode_attention"] + uneven}
    graphs = GraphSizes(decode=(8,), mixed=(64,), max_seqs=8, max_prefills=8)
    return Profile(replace(profile.meta, graphs=graphs, memory=MEMORY), tables)


def ablate(real: RunRecords, profile: Profile, *args: object) -> dict:
    return ablate_replayed(real, replay(real, config_of(real.manifest), profile), profile, *args)


def real_run(profile: Profile, requests: list[TraceRequest], config: ServingConfig = CONFIG) -> RunRecords:
    return with_manifest(run_on(profile, requests, config), "system", **system("test", config))


def test_the_full_model_stands_beside_every_term_and_here_has_no_error():
    result = ablate(real_run(detailed_profile(), sparse()), detailed_profile(), list(TERMS))
    assert list(result) == ["full", *TERMS]
    assert {kind["mape"] for kind in result["full"]["latency_model"].values()} == {0}
    assert result["full"]["closed_loop"] == {"ttft": 0, "tpot": 0, "e2el": 0}


def test_without_the_head_a_step_is_too_short_by_the_heads_time():
    alone = [TraceRequest(0, 0, 30, 40, 40)]
    real = real_run(small_profile(), alone)
    result = ablate(real, small_profile(), ["head"])["head"]
    steps = real.tables["steps"].to_pylist()
    head_ns, decodes = 100_000, [step["device_ns"] for step in steps[1:]]
    errors = [-head_ns / device_ns for device_ns in decodes]
    assert result["latency_model"]["decode"] == pytest.approx(
        {"steps": 39, "mape": -np.mean(errors), "mean_error": np.mean(errors)}, rel=1e-4
    )
    tpot_ns = (steps[-1]["completed_ns"] - steps[0]["completed_ns"]) / 39
    assert result["closed_loop"]["tpot"] == pytest.approx(-head_ns / tpot_ns, rel=1e-4)


def test_without_the_host_batches_take_as_long_and_tokens_come_sooner():
    alone = [TraceRequest(0, 0, 30, 40, 40)]
    real = real_run(small_profile(), alone)
    result = ablate(real, small_profile(), ["host"])
    assert result["host"]["latency_model"] == result["full"]["latency_model"]
    completed = real.tables["steps"]["completed_ns"].to_pylist()
    host_ns = 4 * 20_000  # plan, launch, notice, turn
    assert result["host"]["closed_loop"]["tpot"] == pytest.approx(
        -host_ns * 39 / (completed[-1] - completed[0]), rel=1e-4
    )


@pytest.mark.parametrize(
    ("term", "kind"), [("graph-padding", "decode"), ("graph-padding", "prefill"), ("imbalance", "decode")]
)
def test_without_a_term_the_steps_that_it_lengthens_are_too_short(term, kind):
    uneven = [TraceRequest(i, i * MS, 10 + 120 * (i % 2), 30, 30) for i in range(4)]  # the first prefills 10 alone
    profile = detailed_profile()
    real = real_run(profile, uneven)
    parts, kinds = replay(real, CONFIG, profile).parts_us, step_kinds(real.tables["steps"])
    part = {"graph-padding": "padding", "imbalance": "imbalance"}[term]
    shares = [of[part] / sum(of.values()) for of, its in zip(parts, kinds, strict=True) if its == kind]
    errors = ablate(real, profile, [term])[term]["latency_model"]
    assert errors[kind]["mean_error"] == pytest.approx(-np.mean(shares), rel=1e-3) != 0


def test_without_a_term_that_this_machine_does_not_have_nothing_changes():
    result = ablate(real_run(small_profile(), sparse()), small_profile(), ["imbalance", "graph-padding"])
    assert result["imbalance"] == result["graph-padding"] == result["full"]


def test_a_naive_model_of_memory_has_blocks_for_requests_that_in_truth_had_to_wait():
    scarce = replace(CONFIG, num_blocks=12)
    crowd = [TraceRequest(i, 0, 60, 30, 30) for i in range(8)]
    result = ablate(real_run(small_profile(), crowd, scarce), detailed_profile(), ["kv-blocks"])
    assert [each["num_blocks"] for each in result.values()] == [12, (1000 - 360) // 10]
    profile = replace(small_profile(), meta=replace(small_profile().meta, memory=MEMORY))
    result = ablate(real_run(small_profile(), crowd, scarce), profile, ["kv-blocks"])
    assert result["full"]["closed_loop"]["ttft"] == 0
    assert result["kv-blocks"]["closed_loop"]["ttft"] < -0.3
    assert result["kv-blocks"]["latency_model"] == result["full"]["latency_model"]


def test_a_profile_that_does_not_know_its_memory_says_so():
    with pytest.raises(TandemError, match="this profile does not say what memory the GPU has"):
        read_terms(["host,kv-blocks"], small_profile())
    assert read_terms(["kv-blocks"], detailed_profile()) == ["kv-blocks"]


def test_terms_are_read_with_commas_or_one_by_one_and_each_counts_once():
    assert read_terms(["host,imbalance", "head", "imbalance"], small_profile()) == ["host", "imbalance", "head"]


@pytest.mark.parametrize("said", ["tail", "host,", ""])
def test_an_unknown_term_is_refused_with_those_there_are(said):
    with pytest.raises(TandemError, match="choose from host, imbalance, head, graph-padding, power, kv-blocks"):
        read_terms([said], small_profile())


def test_progress_is_told_of_every_model():
    told: list[int] = []
    ablate(real_run(small_profile(), sparse(3)), small_profile(), ["host", "head"], told.append)
    assert told == [1, 2, 3]


def test_the_tables_show_every_term_under_the_full_model():
    open_loop, closed_loop = ablation_tables(ablate(real_run(small_profile(), sparse()), small_profile(), ["head"]))
    assert open_loop.columns == ("without", "prefill", "decode", "all")
    for table in (open_loop, closed_loop):
        assert [row[0] for row in table.rows] == ["nothing", "head"]
    assert re.fullmatch(r"\d\.\d%\s+-\d\.\d%", open_loop.rows[1][2])
    assert ablation_tables(None) == []
