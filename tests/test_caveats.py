"""What is said before any number: who was not served and why, what was extrapolated, what the machine did besides."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest
from shadow import serve, small_profile

from analysis.jobs.machine_watch import MachineWatch
from analysis.metrics.summary import not_completed, summarize
from analysis.report.caveats import beyond_sentence, completed_sentences, seen_sentences
from engine.config import ServingConfig
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from engine.step import Chunk, Step, StepLoad
from sim.latency_model import LatencyModel
from sim.profile.format import Profile
from sim.simulate import predict
from traces.request import TraceRequest

MS = 1_000_000
LIMITS = ServingConfig(num_blocks=40, max_seqs=4, max_batched_tokens=300, max_model_len=1000, scheduler="fcfs")


def served(requests: list[TraceRequest], trace_requests: int | None = None) -> RunRecords:
    manifest = {} if trace_requests is None else {"workload": {"requests": trace_requests}}
    return RunRecords(manifest, serve(requests, LIMITS)[0].tables())


def said(run: RunRecords) -> list[str]:
    return [*completed_sentences(summarize(run), 10)]


def requests(*lengths: tuple[int, int]) -> list[TraceRequest]:
    return [TraceRequest(i, i * MS, prompt, output, output) for i, (prompt, output) in enumerate(lengths)]


def test_of_a_run_that_served_everyone_nothing_is_said():
    assert said(served(requests((20, 5), (20, 5)))) == []


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([(999, 5), (1200, 8)], "prompt + max_tokens above --max-model-len (1,000); the longest is 1,208: raise it"),
        ([(640, 40), (650, 50)], "all KV blocks (40); the longest needs 44: raise --kv-blocks to 44"),
        (
            [(310, 5), (330, 5)],
            "--max-batched-tokens (300), which this policy does not split; the longest is 334",
        ),
    ],
)
def test_rejected_requests_are_counted_with_the_longest_and_the_option_that_helps(lengths, words):
    rejected, whose = said(served(requests((20, 5), *lengths)))
    assert rejected.startswith("2 of 10 requests were rejected: ") and words in rejected
    assert whose == "Latencies are of the 1 that completed."


def test_reasons_that_differ_in_numbers_alone_are_one_kind_and_others_are_kinds_of_their_own():
    run = served(requests((20, 5), *((310 + i, 5) for i in range(3)), (1100, 5), (1200, 5)))
    assert [(each["outcome"], each["requests"]) for each in not_completed(run)] == [("rejected", 3), ("rejected", 2)]
    assert "316" in not_completed(run)[0]["reason"] and "1205" in not_completed(run)[1]["reason"], "the largest"


def test_a_reason_that_no_scheduler_of_ours_gives_is_told_as_it_is():
    groups = [{"outcome": "rejected", "requests": 3, "reason": "status 429: too many wait."}]
    (sentence, _) = completed_sentences({"completed": 1, "not_completed": groups}, 4)
    assert sentence == "3 of 4 requests were rejected: status 429: too many wait."


def test_requests_that_were_given_up_or_cut_off_or_never_came_are_told_apart():
    given_up = replace(requests((20, 5))[0], cancel_ns=1)
    run = served([given_up, *(replace(each, id=1) for each in requests((20, 5)))], trace_requests=10)
    lost = run.tables["requests"].to_pylist()
    lost[1] |= {"outcome": "unfinished", "last_token_ns": None}
    run.tables = run.tables | {
        "requests": type(run.tables["requests"]).from_pylist(lost, run.tables["requests"].schema)
    }
    told = " ".join(said(run))
    assert "8 of 10 requests were not delivered: the run ended before they came." in told
    assert "1 of 10 requests was cancelled: their clients gave up." in told
    assert "1 of 10 requests was unfinished: in the system when the records end." in told


def test_where_nobody_was_served_there_are_no_latencies_to_speak_of():
    assert said(served(requests((1200, 5))))[-1] == "No request completed: there are no latencies."


# -- beyond the profile --------------------------------------------------------------------------------------------


def bounded() -> Profile:
    """The small profile, whose attention was measured up to contexts of 100 and 8 sequences alone."""
    profile = small_profile()
    ends = {"sequences": [1, 1, 8, 8], "kv_tokens": [1, 100, 8, 800], "time_us": [1.0, 100.0, 8.0, 800.0]}
    rows = [dict(zip(ends, values, strict=True)) for values in zip(*ends.values(), strict=True)]
    decode = [row | {"imbalance": 1, "spread": 0.0} for row in rows]
    return Profile(profile.meta, profile.tables | {"decode_attention": decode})


def decodes(sequences: int, context: int) -> Step:
    cached = context - 1
    return Step(0, decodes=sequences, load=StepLoad(kv_tokens=sequences * cached, kv_squares=sequences * cached**2))


def test_what_was_measured_is_not_beyond_the_profile():
    model = LatencyModel(bounded())
    model.predict(decodes(4, 50))
    assert model.coverage() == {"lookups": 3, "beyond": {}} and beyond_sentence(model.coverage()) == ""


def test_extrapolation_is_told_by_table_with_its_shares_of_look_ups_and_of_the_time():
    model = LatencyModel(bounded())
    times = {context: model.predict(decodes(1, context)) for context in (50, 60, 70, 400)}
    device_us = sum(ns for ns, _ in times.values()) / 1000
    (table, found), *others = model.coverage()["beyond"].items()
    assert (table, others, found["lookups"]) == ("decode_attention", [], 0.25)
    assert found["device_time"] == pytest.approx(400 / device_us, rel=1e-3)  # 1 us a KV token
    assert found["axes"]["context"] == {"asked": [400, 400], "measured": [1, 100]}
    assert re.fullmatch(
        r"Beyond the profile: decode attention 25 % of its look-ups, [\d.]+ % of the device time "
        r"\(context to 400, measured to 100\)\.",
        beyond_sentence(model.coverage()),
    )


@pytest.mark.parametrize(
    ("step", "table"),
    [
        (decodes(5000, 50), "decode_attention"),
        (decodes(5000, 50), "head"),
        (decodes(5000, 50), "dense"),
        (Step(0, chunks={0: Chunk(0, 5000, True)}), "dense"),
        (Step(0, chunks={0: Chunk(5000, 10, True)}), "prefill_attention"),
    ],
)
def test_every_table_that_was_asked_too_far_has_a_share_of_the_time(step, table):
    model = LatencyModel(bounded())
    (device_ns, _), found = model.predict(step), model.coverage()["beyond"][table]
    assert found["lookups"] == 1 and 0 < found["device_time"] <= 1
    assert sum(of["device_time"] for of in model.coverage()["beyond"].values()) <= 1 + 1e-9
    assert device_ns > 0


def test_shares_of_a_simulation_are_of_all_that_its_device_did():
    recorder = Recorder()
    long = [TraceRequest(i, i * 100 * MS, 90, 40, 40) for i in range(4)]
    config = ServingConfig(num_blocks=60, max_seqs=8, max_batched_tokens=256, max_model_len=200)
    found = predict(long, config, bounded(), recorder)["beyond"]["decode_attention"]
    steps = recorder.tables()["steps"].to_pylist()
    contexts = [row["kv_tokens"] + 1 for row in steps if row["decode_tokens"]]
    outside = [context for context in contexts if context > 100]
    assert found["lookups"] == pytest.approx(len(outside) / len(contexts))
    device_us = sum(row["device_ns"] for row in steps) / 1000
    assert found["device_time"] == pytest.approx(sum(outside) / device_us, rel=1e-3)


# -- the machine ---------------------------------------------------------------------------------------------------


def test_a_watch_gives_shares_of_the_cpus_and_the_load():
    watch = MachineWatch()
    seen = watch.seen()
    assert seen["cores"] == os.cpu_count() and len(seen["load_average"]) == 2
    assert all(share is None or 0 <= share <= 1 for share in (seen["steal"], seen["others"]))


def test_what_was_seen_of_a_machine_is_told_run_by_run():
    loud = {"cores": 2, "load_average": [0.5, 3.14], "steal": 0.12, "others": 0.34}
    quiet = {"cores": 2, "load_average": [None, None], "steal": 0.001, "others": None}
    assert [*seen_sentences({"real": loud, "repeat 1": quiet, "repeat 2": None})] == [
        "During real: other processes took 34% of the CPU time, the hypervisor took (steal) 12% of the CPU time, "
        "load average up to 3.1 on 2 cores.",
        "During repeat 1: nothing to see on the CPUs.",
        "During repeat 2: not recorded what else the machine did.",
    ]
