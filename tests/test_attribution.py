"""Where an error comes from, on runs where the truth is known: a machine that differs from its profile in one thing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from shadow import small_profile
from test_compare import CONFIG, MS, as_replay, serve, with_column, workload

from analysis.comparison.compare import compare
from analysis.metrics.columns import step_kinds
from analysis.report.attribution_tables import attribution_sentence
from engine.config import ServingConfig
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from sim.profile.format import Profile
from sim.replay import replay
from sim.simulate import predict
from traces.request import TraceRequest

KERNELS = ("dense", "head", "decode_attention")  # whose times `small_profile` has for any step
OVERLAPPED = replace(CONFIG, pipeline_depth=2)


def scaled(**factors: float) -> Profile:
    """The small profile with some tables' times multiplied."""
    profile = small_profile()
    times = {
        name: [row | {"time_us": row["time_us"] * factors.get(name, 1)} for row in rows]
        for name, rows in profile.tables.items()
    }
    return Profile(profile.meta, times)


def run_on(profile: Profile, requests: Sequence[TraceRequest], config: ServingConfig = CONFIG) -> RunRecords:
    recorder = Recorder()
    predict(requests, config, profile, recorder)
    return RunRecords(serve(requests=workload(1)).manifest, recorder.tables())


def attribution(machine: Profile, model: Profile, requests: Sequence[TraceRequest], config: ServingConfig = CONFIG):
    real = run_on(machine, requests, config)
    found = compare(run_on(model, requests, config), real, replay(real, config, model))["attribution"]
    return found | {"sentence": attribution_sentence(found)}


def sparse(count: int = 40) -> list[TraceRequest]:
    """Requests that never meet."""
    return [replace(each, arrival_ns=each.id * 60 * MS) for each in workload(count)]


def near_saturation(count: int = 200) -> list[TraceRequest]:
    """Arrivals at random, at 19 in 20 of the requests that the small profile can serve."""
    gaps = np.random.default_rng(0).exponential(3.4 * MS, count).cumsum().astype(int).tolist()
    return [replace(each, arrival_ns=arrival) for each, arrival in zip(workload(count), gaps, strict=True)]


def errors(part: dict) -> dict[str, float]:
    return {term: value["ms"] for term, value in part["terms"].items()}


@pytest.mark.parametrize("config", [CONFIG, OVERLAPPED], ids=["depth 1", "depth 2"])
@pytest.mark.parametrize("machine", [scaled(dense=1.1), scaled(dense=0.8, head=2, host=1.5), scaled(host=2)])
def test_where_requests_do_not_meet_steps_and_host_explain_the_whole_error(machine, config):
    for part in attribution(machine, small_profile(), sparse(), config)["latencies"].values():
        assert abs(part["error_ms"] - sum(errors(part).values())) < 1e-9
        assert abs(part["terms"]["queueing"]["error"]) < 0.002


def test_each_latency_is_blamed_on_the_kind_of_step_that_its_tokens_wait_for():
    found = attribution(small_profile(), scaled(dense=1.1), sparse())["latencies"]
    assert {name: part["largest"] for name, part in found.items()} == {
        "ttft": "prefill",
        "tpot": "decode",
        "e2el": "decode",
    }
    dense_ms = (1000 + 10) / 1000  # of one token
    assert errors(found["tpot"])["decode"] == pytest.approx(0.1 * dense_ms, rel=1e-3)
    assert errors(found["tpot"])["host"] == pytest.approx(0, abs=1e-6)


def test_the_host_is_blamed_where_the_device_waits_for_it():
    found = attribution(scaled(host=2), small_profile(), sparse())["latencies"]
    plan_launch_notice_turn_ms = 4 * 0.02
    assert errors(found["tpot"])["host"] == pytest.approx(-plan_launch_notice_turn_ms, rel=0.05)
    assert {part["largest"] for part in found.values()} == {"host"}


def test_a_host_that_is_hidden_behind_the_device_is_not_blamed():
    slow_host = scaled(host=1.9)  # plan, launch, notice and turn take less than a step
    tpot = attribution(slow_host, small_profile(), sparse(), OVERLAPPED)["latencies"]["tpot"]
    assert abs(errors(tpot)["host"]) < 0.01
    assert abs(tpot["error"]) < 0.01


def test_the_time_that_the_loop_waits_for_arrivals_is_no_host_time():
    """The same steps, with hours between the requests of one run and none between those of the other."""
    alone, together = sparse(10), [replace(each, arrival_ns=each.id * 3_600_000 * MS) for each in workload(10)]
    means = []
    for requests in (alone, together):
        found = attribution(scaled(host=2), small_profile(), requests)["latencies"]
        means.append({name: errors(part)["host"] for name, part in found.items()})
    assert means[0] == pytest.approx(means[1], abs=1e-4)


def test_near_saturation_a_small_error_is_amplified_by_queueing():
    found = attribution(scaled(dense=1.05), small_profile(), near_saturation())["latencies"]
    assert found["ttft"]["largest"] == "queueing"
    assert abs(found["ttft"]["error"]) > 0.15
    assert found["tpot"]["largest"] != "queueing"


def waited_ms(real: RunRecords, wrong_ms: Sequence[float], since: str, until: str) -> list[float]:
    """Request by request and step by step: what lies between two of its times, of a step in part if it began before."""
    steps, requests = (real.tables[name].to_pylist() for name in ("steps", "requests"))
    device_end = {step["completed_ns"]: step["device_start_ns"] + step["device_ns"] for step in steps}
    waited = dict.fromkeys((each["request"] for each in requests), 0.0)
    completed = begin = 0
    for step, wrong in zip(steps, wrong_ms, strict=True):
        end = device_end[step["completed_ns"]]
        if not any(each["arrival_ns"] <= completed < each["last_token_ns"] for each in requests):
            begin = min(each["arrival_ns"] for each in requests if each["arrival_ns"] > completed)
        for each in requests:
            window = [device_end.get(each[time], each[time]) for time in (since, until)]
            shared = min(end, window[1]) - max(begin, window[0])
            waited[each["request"]] += wrong * max(shared, 0) / (end - begin)
        completed, begin = step["completed_ns"], end
    return list(waited.values())


@pytest.mark.parametrize("gap_ms", [5, 20, 30])
def test_a_request_is_charged_with_the_steps_it_waited_for(gap_ms):
    requests = [replace(each, arrival_ns=(each.id + 1) * gap_ms * MS) for each in workload()]
    real = run_on(scaled(dense=1.1), requests)
    replayed = replay(real, CONFIG, small_profile())
    predicted, measured = replayed.predicted_ns, real.tables["steps"]["device_ns"].to_numpy()
    found = compare(real, real, replayed)["attribution"]["latencies"]
    kinds = step_kinds(real.tables["steps"])
    for kind in np.unique(kinds):
        wrong_ms = np.where(kinds == kind, predicted - measured, 0) / MS
        ttft = waited_ms(real, wrong_ms, "arrival_ns", "first_token_ns")
        after = waited_ms(real, wrong_ms, "first_token_ns", "last_token_ns")
        tokens = real.tables["requests"]["output_len"].to_pylist()
        tpot = [ms / (output - 1) for ms, output in zip(after, tokens, strict=True)]
        e2el = np.add(ttft, after)
        for name, values in (("ttft", ttft), ("tpot", tpot), ("e2el", e2el)):
            assert errors(found[name])[kind] == pytest.approx(np.mean(values), rel=1e-6, abs=1e-9)


def test_copies_that_keep_everyone_waiting_are_blamed_on_swap_steps():
    config = replace(CONFIG, num_blocks=14, num_cpu_blocks=40, max_batched_tokens=256)
    requests = [TraceRequest(i, 0, 60, 60, 60) for i in range(6)]
    found = attribution(scaled(swap=3), small_profile(), requests, config)["latencies"]
    assert found["e2el"]["largest"] == "swap"
    assert errors(found["e2el"])["decode"] == errors(found["e2el"])["prefill"] == 0


# -- kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_that_is_wrong_is_named_with_how_much(kernel):
    long = [TraceRequest(i, i * 200 * MS, 900, 40, 40) for i in range(10)]  # contexts at which attention counts
    config = replace(CONFIG, num_blocks=600, max_model_len=1000)
    for factor, way in ((1.1, "too long"), (0.9, "too short")):
        found = attribution(small_profile(), scaled(**{kernel: factor}), long, config)
        fit = found["kernels"]
        assert fit["largest"] == kernel
        assert fit["kernels"][kernel]["error"] == pytest.approx(factor - 1, abs=1e-3)
        assert all(abs(fit["kernels"][other]["error"]) < 1e-3 for other in KERNELS if other != kernel)
        assert f"{kernel} is predicted 10.0% {way}" in found["sentence"]


def noisy(run: RunRecords, seed: int) -> RunRecords:
    """The same run on a machine that is off by some 3 % in each step."""
    factors = np.random.default_rng(seed).normal(1, 0.03, len(run.tables["steps"]))
    return with_column(
        run, "steps", "device_ns", np.rint(run.tables["steps"]["device_ns"].to_numpy() * factors).astype(int)
    )


@pytest.mark.parametrize("seed", range(5))
def test_noise_hides_no_large_error_and_makes_none_up(seed):
    real = noisy(run_on(small_profile(), workload()), seed)
    for factor, largest in ((1.1, "dense"), (1.0, None)):
        model = scaled(dense=factor)
        fit = compare(real, real, replay(real, CONFIG, model))["attribution"]["kernels"]
        assert fit["largest"] == largest
        off = fit["kernels"]["dense"]
        assert abs(off["error"] - (factor - 1)) < 4 * off["uncertainty"]


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_uncertainty_of_an_error_is_how_much_that_error_differs_between_noisy_runs(factor):
    run, model = run_on(small_profile(), workload()), scaled(dense=factor)
    fits = []
    for seed in range(30):
        real = noisy(run, seed)
        fits.append(compare(real, real, replay(real, CONFIG, model))["attribution"]["kernels"]["kernels"])
    for error, uncertainty in (("error", "uncertainty"), ("ms_per_step", "ms_uncertainty")):
        spread = np.std([fit["dense"][error] for fit in fits], ddof=1)
        assert np.mean([fit["dense"][uncertainty] for fit in fits]) == pytest.approx(spread, rel=0.35)


def test_what_a_kernel_costs_a_step_is_its_error_in_the_mean_step():
    real = run_on(small_profile(), workload())
    model = scaled(dense=1.1)
    replayed = replay(real, CONFIG, model)
    kernels = compare(real, real, replayed)["attribution"]["kernels"]["kernels"]
    whole_ns = replayed.predicted_ns - real.tables["steps"]["device_ns"].to_numpy()
    assert sum(kernel["ms_per_step"] for kernel in kernels.values()) == pytest.approx(whole_ns.mean() / MS, rel=1e-3)


def test_of_few_steps_nothing_is_claimed():
    one = [TraceRequest(0, 0, 30, 40, 40)]
    found = attribution(small_profile(), scaled(dense=1.5), one)
    assert found["kernels"] == {"steps": 40, "kernels": {}, "largest": None}
    assert "predicted" not in found["sentence"]


def test_of_a_kernel_in_few_of_many_steps_nothing_is_claimed():
    for count, certain in ((40, False), (60, True)):
        run = run_on(small_profile(), sparse(count))
        prefills = step_kinds(run.tables["steps"]) == "prefill"
        real = with_column(run, "steps", "device_ns", run.tables["steps"]["device_ns"].to_numpy() + prefills * MS // 2)
        replayed = replay(run, CONFIG, small_profile())
        parts = [
            part | {"prefill_attention": 1000.0 * prefill}  # it takes half of that
            for part, prefill in zip(replayed.parts_us, prefills, strict=True)
        ]
        fit = compare(run, real, replace(replayed, parts_us=parts))["attribution"]["kernels"]
        kernel = fit["kernels"]["prefill_attention"]
        assert (kernel["steps"], kernel["certain"]) == (count, certain)
        assert kernel["error"] == pytest.approx(1, rel=0.01)


def test_kernels_that_grow_alike_cannot_be_told_apart():
    real = run_on(small_profile(), workload())
    replayed = replay(real, CONFIG, small_profile())
    alike = [{"dense": ns / 2e3, "head": ns / 1e3} for ns in replayed.predicted_ns.tolist()]
    found = compare(real, real, replace(replayed, parts_us=alike))["attribution"]
    assert found["kernels"]["largest"] is None
    assert {kernel["uncertainty"] for kernel in found["kernels"]["kernels"].values()} == {None}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


# -- words -------------------------------------------------------------------------------------------------


def test_a_run_compared_with_itself_has_nothing_to_break_down():
    found = attribution(small_profile(), small_profile(), workload())
    assert found["sentence"].startswith("There is no closed-loop error to break down.")


def test_the_sentence_names_the_largest_term_of_each_latency():
    sentence = attribution(small_profile(), scaled(dense=1.1), sparse())["sentence"]
    assert "of mean TTFT (+" in sentence and "prefill steps (+" in sentence
    assert "of mean TPOT (+" in sentence and "decode steps (+" in sentence


def test_where_decisions_differ_the_error_is_not_broken_down():
    real = run_on(small_profile(), workload())
    late = replace(real, tables=real.tables | {"steps": real.tables["steps"].slice(0, 10)})
    assert compare(real, real, as_replay(late))["attribution"] is None
