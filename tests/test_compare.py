"""What a comparison says: errors against hand-made oracles, differences found, and when it must not judge."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console
from shadow import small_profile

from analysis.comparison.compare import compare, is_met
from analysis.comparison.runs import check_once, check_roles
from analysis.comparison.targets import STUDY_TARGETS, Targets, read_targets
from analysis.jobs.compare import compare_runs
from analysis.jobs.options import Comparing
from analysis.metrics.columns import step_kinds
from analysis.metrics.summary import metrics, request_metrics
from analysis.metrics.tokens import itl
from analysis.report.console_progress import ConsoleProgress
from engine.config import ServingConfig
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from sim.latency_model import LatencyModel
from sim.replay import Replay, replay
from sim.simulate import predict
from traces.errors import TandemError
from traces.request import TraceRequest

MS = 1_000_000
CONFIG = ServingConfig(num_blocks=60, max_seqs=8, max_batched_tokens=64, max_model_len=200)


def workload(count: int = 40, prompt_len: int = 30) -> list[TraceRequest]:
    return [TraceRequest(i, i * 20 * MS, prompt_len + i % 7, 10 + i % 13, 10 + i % 13) for i in range(count)]


def serve(scale: float = 1.0, requests: list[TraceRequest] | None = None) -> RunRecords:
    """A run on a machine that is `scale` times as slow as the profile says."""
    recorder = Recorder()
    predict(requests or workload(), CONFIG, small_profile(scale), recorder)
    manifest = {
        "workload": {"trace": "ab12", "model": {"layers": 2}},
        "system": {"num_blocks": 60, "scheduler": "chunked_prefill"},
        "provenance": {"host": f"machine {scale}"},
    }
    return RunRecords(manifest, recorder.tables())


def replayed(run: RunRecords) -> Replay:
    return replay(run, CONFIG, small_profile())


def as_replay(run: RunRecords) -> Replay:
    """A run in place of a replay that predicts its times."""
    return Replay(run, run.tables["steps"]["device_ns"].to_numpy())


def with_column(run: RunRecords, table: str, name: str, values: Any) -> RunRecords:
    rows = run.tables[table]
    changed = rows.set_column(rows.column_names.index(name), name, pa.array(values))
    return replace(run, tables=run.tables | {table: changed})


def with_manifest(run: RunRecords, part: str, **fields: Any) -> RunRecords:
    return replace(run, manifest=run.manifest | {part: run.manifest[part] | fields})


@pytest.fixture(scope="module")
def sim() -> RunRecords:
    return serve()


@pytest.fixture(scope="module")
def real() -> RunRecords:
    return serve(1.2)


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    return [tree]


def test_a_run_compared_with_itself_has_no_error(sim):
    result = compare(sim, sim, replayed(sim), [sim])
    assert result["decisions"] == {"identical": True, "steps": len(sim.tables["steps"]), "first_difference": None}
    assert result["requests"] == 40
    for part in result["closed_loop"].values():
        assert part["mape"] == part["ks"] == 0
        assert [part[stat]["error"] for stat in ("mean", "p50", "p90", "p99")] == [0, 0, 0, None]
    assert {part["mape"] for part in result["latency_model"].values()} == {0}
    assert set(leaves(result["repeat_spread"])) == {0, None}
    assert result["overall"] == "within"


def test_closed_loop_errors_are_signed_fractions_of_the_real_runs_metrics(sim, real):
    result, ours, theirs = compare(sim, real, replayed(real)), metrics(sim), metrics(real)
    for name in ("ttft", "tpot", "itl", "e2el"):
        for stat in ("mean", "p50", "p90"):
            pair, key = result["closed_loop"][name][stat], f"{stat}_{name}_ms"
            assert (pair["sim"], pair["real"]) == pytest.approx((ours[key], theirs[key]))
            assert pair["error"] == pytest.approx((ours[key] - theirs[key]) / theirs[key])
    assert result["closed_loop"]["tpot"]["mean"]["error"] < -0.1  # the real machine was slower


def ks_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest distance between two empirical distribution functions, looked for at every value."""
    return max(abs(np.mean(ours <= value) - np.mean(theirs <= value)) for value in [*ours, *theirs])


def test_mape_is_over_requests_and_ks_over_distributions(sim, real):
    closed_loop = compare(sim, real, replayed(real))["closed_loop"]
    ours, theirs = request_metrics(sim), request_metrics(real)
    for name in ("ttft", "tpot", "e2el"):
        errors = [abs(a - b) / b for a, b in zip(ours[name], theirs[name], strict=True)]
        assert closed_loop[name]["mape"] == pytest.approx(sum(errors) / len(errors))
        assert closed_loop[name]["ks"] == pytest.approx(ks_distance(ours[name], theirs[name]))
    assert closed_loop["itl"]["mape"] == pytest.approx(closed_loop["tpot"]["mape"])
    assert closed_loop["itl"]["ks"] == pytest.approx(ks_distance(itl(sim), itl(real)))


def test_requests_are_matched_by_id_and_those_that_completed_in_one_run_only_are_left_out(sim):
    outcomes = sim.tables["requests"]["outcome"].to_pylist()
    real = with_column(sim, "requests", "outcome", ["cancelled"] * 5 + outcomes[5:])
    result = compare(sim, real, replayed(sim))
    assert result["requests"] == 35
    assert result["closed_loop"]["e2el"]["mean"]["error"] == result["closed_loop"]["itl"]["ks"] == 0


def test_latency_model_errors_are_means_over_the_steps_of_each_kind(real):
    kinds = step_kinds(real.tables["steps"])
    measured = real.tables["steps"]["device_ns"].to_numpy()
    alternating = np.where(np.arange(len(kinds)) % 2, 1.3, 0.9)
    predicted = measured * np.where(kinds == "decode", 1.2, alternating)
    result = compare(real, real, Replay(real, np.rint(predicted).astype(int)))
    latency_model = result["latency_model"]

    counts = {kind: int(np.sum(kinds == kind)) for kind in ("prefill", "decode", "mixed")}
    assert {kind: latency_model[kind]["steps"] for kind in counts} == counts
    assert latency_model["decode"] == pytest.approx({"steps": counts["decode"], "mape": 0.2, "mean_error": 0.2}, 1e-4)
    mixed = alternating[kinds == "mixed"] - 1
    assert latency_model["mixed"]["mape"] == pytest.approx(np.abs(mixed).mean(), 1e-4)
    assert latency_model["mixed"]["mean_error"] == pytest.approx(mixed.mean(), 1e-4)
    weighted = sum(latency_model[kind]["mape"] * counts[kind] for kind in counts) / len(kinds)
    assert latency_model["all"]["mape"] == pytest.approx(weighted)


def test_kinds_of_steps_that_never_ran_are_left_out():
    one_at_a_time = serve(requests=[TraceRequest(0, 0, 10, 5, 5)])
    assert list(compare(one_at_a_time, one_at_a_time, as_replay(one_at_a_time))["latency_model"]) == [
        "prefill",
        "decode",
        "all",
    ]


def test_the_first_step_that_was_decided_differently_is_found_and_described(sim):
    arrivals = sim.tables["requests"]["delivered_ns"].to_pylist()
    late = with_column(sim, "requests", "delivered_ns", [*arrivals[:20], arrivals[20] + 10 * MS, *arrivals[21:]])
    replay_of_late = replayed(late)
    result = compare(sim, sim, replay_of_late)
    difference = result["decisions"]["first_difference"]
    step = difference["step"]

    ours, theirs = (run.tables["steps"].to_pylist() for run in (sim, replay_of_late.records))
    assert [row["digest"] for row in ours[:step]] == [row["digest"] for row in theirs[:step]]
    assert difference["real"] == ours[step]["digest"].hex() != difference["replay"] == theirs[step]["digest"].hex()
    assert ours[step]["scheduled_ns"] == sim.tables["iterations"]["now_ns"].to_pylist()[difference["iteration"]]
    assert ours[step]["scheduled_ns"] >= arrivals[20]
    assert difference["columns"]["chunks"] == {"real": ours[step]["chunks"], "replay": theirs[step]["chunks"]}
    assert result["latency_model"]["all"]["steps"] == step  # afterwards the batches are not the same
    assert (result["decisions"]["identical"], result["overall"]) == (False, "decisions differ")


@pytest.mark.parametrize("shorter", ["real", "replay"])
def test_a_run_with_more_steps_than_the_other_differs_at_the_first_of_them(sim, shorter):
    cut = replace(sim, tables=sim.tables | {"steps": sim.tables["steps"].slice(0, 10)})
    real, replayed = {"real": (cut, sim), "replay": (sim, cut)}[shorter]
    difference = compare(sim, real, as_replay(replayed))["decisions"]["first_difference"]
    assert difference["step"] == 10
    assert difference[shorter] is None
    assert difference["columns"]["running"][shorter] is None


def test_runs_of_different_workloads_or_systems_are_refused_by_field(sim, real):
    other = with_manifest(with_manifest(real, "system", num_blocks=99), "workload", model={"layers": 3})
    message = (
        r"\(system\.num_blocks: real 99, sim 60; workload\.model\.layers: real 3, sim 2\).*"
        r"--allow-different system\.num_blocks --allow-different workload\.model\.layers"
    )
    with pytest.raises(TandemError, match=message):
        compare(sim, other, replayed(real))


def test_a_field_that_one_manifest_lacks_differs(sim, real):
    with pytest.raises(TandemError, match=r"system\.gpu: real H200, sim \(absent\)"):
        compare(sim, with_manifest(real, "system", gpu="H200"), replayed(real))


@pytest.mark.parametrize("allowed", ["system.num_blocks", "system"])
def test_a_difference_that_is_allowed_is_on_record(sim, real, allowed):
    other = with_manifest(real, "system", num_blocks=99)
    result = compare(sim, other, replayed(real), [real], allow_different=[allowed])
    assert result["manifest_differences"] == {"system.num_blocks": {"real": 99, "sim": 60, "repeat 1": 60}}


def test_allowing_a_field_does_not_allow_those_whose_names_begin_alike(sim, real):
    with pytest.raises(TandemError, match="num_blocks"):
        compare(sim, with_manifest(real, "system", num_blocks=99), replayed(real), allow_different=["system.num"])


def test_repeats_must_be_of_the_same_workload_and_system(sim, real):
    with pytest.raises(TandemError, match=r"real chunked_prefill, repeat 2 fcfs"):
        compare(sim, real, replayed(real), [real, with_manifest(real, "system", scheduler="fcfs")])


def test_provenance_is_never_compared(sim, real):
    assert sim.manifest["provenance"] != real.manifest["provenance"]
    assert compare(sim, real, replayed(real))["manifest_differences"] == {}


def test_repeat_spread_is_the_range_of_the_real_runs_over_their_mean(sim, real):
    repeats = [serve(1.3), serve(1.25)]
    spread = compare(sim, real, replayed(real), repeats)["repeat_spread"]
    for name in ("ttft", "tpot", "itl", "e2el"):
        for stat in ("mean", "p50", "p90"):
            values = [metrics(run)[f"{stat}_{name}_ms"] for run in (real, *repeats)]
            assert spread[name][stat] == pytest.approx((max(values) - min(values)) / np.mean(values))


def test_the_spread_is_of_requests_that_completed_in_every_repeat(sim):
    outcomes = sim.tables["requests"]["outcome"].to_pylist()
    fewer = with_column(sim, "requests", "outcome", ["cancelled"] * 15 + outcomes[15:])
    result = compare(sim, sim, replayed(sim), [fewer])
    assert {*leaves(result["repeat_spread"])} == {0, None}, "runs that took the same times"
    assert [each["requests"] for each in result["not_completed"]["repeat 1"]] == [15]


def test_the_latency_models_spread_is_the_error_that_a_perfect_model_would_show(real):
    # The machine of these two runs is off by a random factor in each step; a perfect model predicts a factor of 1.
    exact_ns = real.tables["steps"]["device_ns"].to_numpy()
    factors = np.random.default_rng(0).normal(1, 0.1, (2, len(exact_ns)))
    noisy, repeat = (with_column(real, "steps", "device_ns", np.rint(exact_ns * each).astype(int)) for each in factors)
    decode = step_kinds(real.tables["steps"]) == "decode"
    perfect_mape = np.abs(1 / factors[0][decode] - 1).mean()
    spread = compare(noisy, noisy, replayed(noisy), [repeat])["repeat_spread"]["latency_model"]
    assert spread == pytest.approx(perfect_mape, rel=0.25)


def test_without_repeats_there_is_no_spread_and_errors_are_judged_all_the_same(sim, real):
    result = compare(sim, real, replayed(real))
    assert set(leaves(result["repeat_spread"])) == {None}
    assert {item["verdict"] for item in result["verdict"].values()} == {"outside"}
    assert result["overall"] == "outside"


def test_an_error_is_within_up_to_what_is_allowed(sim, real):
    error = abs(compare(sim, real, replayed(real))["closed_loop"]["tpot"]["mean"]["error"])
    for allowed, verdict in ((error, "within"), (error * 0.999, "outside")):
        result = compare(sim, real, replayed(real), targets=Targets(tpot=allowed))
        assert result["verdict"]["mean_tpot"]["verdict"] == verdict


def test_an_item_is_too_noisy_to_judge_exactly_when_the_spread_exceeds_the_error_allowed(sim, real):
    repeats = [serve(1.3)]
    spread = compare(sim, real, replayed(real), repeats)["repeat_spread"]
    for allowed, noisy in ((spread["e2el"]["mean"], False), (spread["e2el"]["mean"] * 0.999, True)):
        result = compare(sim, real, replayed(real), repeats, targets=Targets(e2el=allowed))
        assert (result["verdict"]["mean_e2el"]["verdict"] == "too noisy to judge") == noisy


def test_targets_are_read_in_percent_and_hold_at_every_load():
    given = read_targets("5,2,1.5", STUDY_TARGETS)
    assert (given.ttft, given.tpot, given.e2el) == (0.05, 0.02, 0.015)
    assert given.model == STUDY_TARGETS.model and given.at_load(1.0) is given
    assert set(read_targets("5,2,2,4", STUDY_TARGETS).model.values()) == {0.04}
    assert read_targets(None, STUDY_TARGETS) is STUDY_TARGETS
    assert STUDY_TARGETS.at_load(0.9) is STUDY_TARGETS and STUDY_TARGETS.at_load(1.0).tpot == 0.05


@pytest.mark.parametrize("text", ["", "5", "5,2", "5,2,2,2,2", "5,two,2", "5,0,2", "5,-1,2", "5,nan,2", "5,inf,2"])
def test_targets_that_cannot_be_read_are_refused_with_an_example(text):
    with pytest.raises(TandemError, match=r"--targets: cannot read '.*'; write .* --targets 15,10,10"):
        read_targets(text, STUDY_TARGETS)


def test_a_noisy_machine_never_passes(sim):
    result = compare(sim, sim, replayed(sim), [serve(2.0)])
    assert {item["verdict"] for item in result["verdict"].values()} == {"too noisy to judge"}
    assert result["overall"] == "too noisy to judge"


def test_p99_is_given_from_200_requests_up():
    few, many = (serve(requests=workload(count)) for count in (199, 200))
    assert compare(few, few, as_replay(few))["closed_loop"]["ttft"]["p99"] == {"real": None, "sim": None, "error": None}
    assert compare(many, many, as_replay(many))["closed_loop"]["itl"]["p99"]["error"] == 0


def test_runs_that_completed_nothing_in_common_have_nothing_to_judge():
    rejected = serve(requests=workload(prompt_len=500))
    result = compare(rejected, rejected, replayed(rejected), [rejected])
    assert result["requests"] == 0
    assert result["latency_model"] == {}
    assert result["overall"] == "nothing to judge"
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_a_comparison_is_json_and_names_the_runs_that_were_interrupted(sim, real):
    result = compare(sim, replace(real, partial=True), replayed(real), [real])
    assert result["partial"] == ["real"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


# -- which run is real -------------------------------------------------------------------------------------


def ridden(run: RunRecords, backend: str) -> RunRecords:
    return with_manifest(run, "provenance", backend=backend)


def test_a_simulated_and_a_real_run_in_their_places_are_taken(sim, real):
    check_roles({"s": ridden(sim, "simulator"), "r": ridden(real, "executor")})


@pytest.mark.parametrize(
    ("backends", "words"),
    [
        (("executor", "simulator"), r"a is the real run.*tandem compare b a --repeat c"),
        (("executor", "executor"), r"both real.*tandem compare SIM a --repeat b --repeat c"),
        (("simulator", "client"), r"b is what a client saw"),
        (("simulator", "abacus"), r"b: provenance\.backend is abacus"),
    ],
)
def test_runs_in_other_places_are_refused_with_the_command_that_is_right(sim, real, backends, words):
    runs = {name: ridden(real, backend) for name, backend in zip("abc", (*backends, "executor"), strict=True)}
    with pytest.raises(TandemError, match=words):
        check_roles(runs)


def test_a_real_run_given_twice_is_refused_and_a_simulation_may_repeat(sim):
    check_once({"a": ridden(sim, "simulator"), "b": ridden(sim, "simulator"), "c": ridden(sim, "executor")})
    with pytest.raises(TandemError, match="a and b are one and the same run"):
        check_once({"a": ridden(sim, "executor"), "b": ridden(sim, "executor")})


# -- whether it is what was asked for --------------------------------------------------------------------------


def test_what_was_asked_for_is_met_by_equal_decisions_and_no_error_outside(sim, real):
    assert is_met(compare(sim, sim, replayed(sim)))
    assert is_met(compare(sim, sim, replayed(sim), [serve(2.0)])), "a machine too noisy to judge fails nobody"
    assert not is_met(compare(sim, real, replayed(real))), "errors outside"
    cut = replace(sim, tables=sim.tables | {"steps": sim.tables["steps"].slice(0, 10)})
    assert not is_met(compare(sim, sim, as_replay(cut))), "decisions differ"
    rejected = serve(requests=workload(prompt_len=500))
    assert not is_met(compare(rejected, rejected, replayed(rejected))), "nothing was compared"


def test_one_replay_serves_the_whole_comparison(sim, real, tmp_path, monkeypatch):
    full = with_manifest(real, "system", **asdict(CONFIG))
    models = []
    monkeypatch.setattr("sim.replay.LatencyModel", lambda *args: models.append(LatencyModel(*args)) or models[-1])
    how = Comparing(allow_different=[f"system.{each.name}" for each in fields(CONFIG)])
    found = compare_runs([sim, full], small_profile(), tmp_path, ConsoleProgress(Console(quiet=True)), how)
    assert len(models) == 1
    assert found["attribution"]["kernels"]["kernels"] and found["coverage"] == models[0].coverage()
