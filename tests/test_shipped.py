"""The profiles that ship: small, quick to load, in the order that physics demands, as exact as they say."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from engine.step import Chunk, Step, StepLoad
from sim.latency_model import LatencyModel
from sim.profile.format import Profile, read_profile, shipped_profiles
from sim.profiling.gpu import HELD_OUT as BATCHES
from sim.profiling.held_out import held_out_batches, serving_batches, with_held_out_error

CHUNKS = (256, 512, 1024, 2048)
CONTEXTS = (0, 128, 512, 1024, 2048, 4000)
SEQUENCES = (1, 8, 32, 64, 128, 256)
# Of batches that ran in bursts, right after the profile. Where serving takes another time than that, the profile was
# calibrated away from them, to its served runs (tests/test_golden.py).
HELD_OUT = {"h200/llama-3-8b": 0.025, "h100-80gb/llama-2-7b": 0.02}
MEASURED = [name for name, folder in shipped_profiles().items() if read_profile(folder).meta.limits]


@pytest.fixture(params=shipped_profiles())
def shipped(request) -> Profile:
    return read_profile(shipped_profiles()[request.param])


@pytest.fixture
def h100() -> Profile:
    return read_profile(shipped_profiles()["h100-80gb/llama-3-8b"])


def decodes(sequences: int, context: int) -> Step:
    return Step(0, decodes=sequences, load=StepLoad(kv_tokens=sequences * context, kv_squares=sequences * context**2))


def attention_us(model: LatencyModel, step: Step) -> float:
    parts = model.parts_us(step)
    return parts["prefill_attention"] + parts["decode_attention"]


def rises(times: list[float], slack: float = 0.0) -> bool:
    return all(after >= (1 - slack) * before for before, after in pairwise(times))


@pytest.mark.parametrize("name", shipped_profiles())
def test_it_is_small_and_loads_and_gives_its_first_step_in_less_than_100_ms(name):
    folder = shipped_profiles()[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 64 * 1024
    read_profile(folder)  # the first Parquet file of a process waits for its library
    start = time.perf_counter()
    assert LatencyModel(read_profile(folder)).device_ns(decodes(100, 600)) > 0
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize("name", MEASURED)
def test_the_error_that_it_states_is_its_error_on_the_batches_that_were_held_out(name):
    profile = read_profile(shipped_profiles()[name])
    stated, found = profile.meta.held_out, with_held_out_error(profile).meta.held_out
    assert [batch.shape for batch in held_out_batches(profile)] == serving_batches(profile.meta.limits, BATCHES)
    assert found["by_kind"] == {kind: pytest.approx(errors) for kind, errors in stated["by_kind"].items()}
    assert found["mape"] == pytest.approx(stated["mape"])
    assert stated["mape"] < HELD_OUT.get(name, 0.01)


def test_large_chunks_attend_for_longer_the_larger_they_are(shipped):
    model = LatencyModel(shipped)
    for context in CONTEXTS:
        steps = [Step(0, chunks={0: Chunk(context, chunk, True)}) for chunk in CHUNKS]
        assert rises([attention_us(model, step) for step in steps])


def test_large_chunks_attend_for_longer_the_more_came_before(shipped):
    model = LatencyModel(shipped)
    for chunk in CHUNKS:
        steps = [Step(0, chunks={0: Chunk(context, chunk, True)}) for context in CONTEXTS]
        assert rises([attention_us(model, step) for step in steps])


def test_decodes_attend_for_longer_the_more_tokens_they_attend_to(shipped):
    model = LatencyModel(shipped)
    for sequences in SEQUENCES:
        contexts = (32, 128, 256, 512, 1024, 2048)
        assert rises([attention_us(model, decodes(sequences, context)) for context in contexts], slack=0.02)


def test_twice_as_many_rows_take_no_less_time(h100):
    """Coarsely: from one captured size to the next a step may get shorter, as cuBLAS chooses another kernel."""
    for kind in ("decode", "mixed"):
        of_kind = {row["rows"]: row["time_us"] for row in h100.tables["graph"] if row["kind"] == kind}
        assert all(rises([of_kind[rows], of_kind[2 * rows]], slack=0.01) for rows in of_kind if 2 * rows in of_kind)
        assert rises([*of_kind.values()], slack=0.02)  # no size is captured that takes longer than a larger one


def test_steps_within_the_limits_are_covered_and_others_counted(h100):
    model = LatencyModel(h100)
    model.device_ns(decodes(256, 1000))
    model.device_ns(
        Step(0, chunks={0: Chunk(512, 1024, True)}, decodes=100, load=StepLoad(kv_tokens=60_000, kv_squares=4 * 10**7))
    )
    assert model.coverage()["lookups"] >= 7 and not model.coverage()["beyond"]
    model.device_ns(decodes(300, 1000))
    model.device_ns(Step(0, chunks={0: Chunk(16_000, 8, True)}))
    assert set(model.coverage()["beyond"]) == {"head", "decode_attention", "prefill_attention"}
