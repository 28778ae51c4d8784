"""Latency profiles: what is written is read back, what is wrong is refused, and lookups do what they say."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from shadow import small_profile

from engine.config import ServingConfig
from engine.model_config import load_model_config
from engine.step import Chunk, Step
from sim.latency import LatencyModel
from sim.profile import Curve, Profile, Surface, read_profile, write_profile
from sim.profiler import count_passes, plan
from sim.roofline import roofline_profile
from traces.errors import TandemError

LLAMA3 = load_model_config("llama-3-8b")
times = st.floats(0, 1e6)


@pytest.fixture(scope="module")
def a100() -> Profile:
    return roofline_profile("a100-80gb", LLAMA3)


def test_a_profile_is_read_back_as_written(a100, tmp_path):
    write_profile(a100, tmp_path / "p")
    again = read_profile(tmp_path / "p")
    assert again.tables == a100.tables and again.model == a100.model == LLAMA3
    assert again.name == "llama-3-8b float16 on NVIDIA A100-SXM4-80GB"


def break_meta(folder, **changes):
    meta = yaml.safe_load((folder / "meta.yaml").read_text()) | changes
    (folder / "meta.yaml").write_text(yaml.safe_dump(meta))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "meta.yaml").unlink(), "no meta.yaml"),
        (lambda folder: (folder / "meta.yaml").write_text("- just\n- a list"), "not profile schema"),
        (lambda folder: break_meta(folder, schema=99), "not profile schema"),
        (lambda folder: (folder / "dense.parquet").unlink(), "dense.parquet"),
        (lambda folder: (folder / "head.parquet").write_bytes(b"PAR1 torn"), "head.parquet"),
    ],
)
def test_a_damaged_profile_is_refused_by_name(a100, tmp_path, damage, words):
    write_profile(a100, tmp_path / "p")
    damage(tmp_path / "p")
    with pytest.raises(TandemError, match=words):
        read_profile(tmp_path / "p")


@pytest.mark.parametrize("time_us", [float("nan"), float("inf"), -1.0, "12", None])
def test_a_time_that_is_no_time_is_refused(time_us):
    tables = {name: [dict(row) for row in rows] for name, rows in small_profile().tables.items()}
    tables["dense"][0]["time_us"] = time_us
    with pytest.raises(TandemError, match="table dense, row 0"):
        Profile(small_profile().meta, tables)


def test_a_missing_table_and_a_missing_host_term_are_named():
    profile = small_profile()
    with pytest.raises(TandemError, match="decode_attention is missing"):
        Profile(profile.meta, {name: rows for name, rows in profile.tables.items() if name != "decode_attention"})
    host = [row for row in profile.tables["host"] if row["term"] != "notice"]
    with pytest.raises(TandemError, match="host: no notice"):
        Profile(profile.meta, profile.tables | {"host": host})


@given(st.dictionaries(st.integers(0, 1000), times, min_size=1, max_size=8), st.floats(0, 2000))
def test_a_curve_meets_its_points_and_stays_between_neighbours(points, x):
    curve = Curve(points)
    assert all(curve(each) == pytest.approx(points[each], abs=1e-6) for each in points)
    assert curve(x) >= 0
    if curve.covers(x):
        left, right = max(p for p in points if p <= x), min(p for p in points if p >= x)
        low, high = sorted((points[left], points[right]))
        assert low - 1e-6 <= curve(x) <= high + 1e-6


@given(st.dictionaries(st.tuples(st.integers(0, 50), st.integers(0, 50)), times, min_size=1, max_size=12))
def test_a_surface_meets_its_points(points):
    surface = Surface(points)
    assert all(surface(*point) == pytest.approx(time, abs=1e-6) for point, time in points.items())
    assert all(surface.covers(*point) for point in points)


def test_beyond_its_ends_a_curve_goes_on_and_says_so():
    curve = Curve({10: 100.0, 20: 200.0})
    assert (curve(30), curve(5), curve(0)) == (300.0, 50.0, 0.0)
    assert not curve.covers(30) and not curve.covers(5)


def test_lookups_outside_the_measured_range_are_counted(a100):
    model = LatencyModel(a100)
    model.device_ns(Step(0, decodes=4, kv_tokens=4000))
    assert model.lookups.total() == 3 and not model.outside
    model.device_ns(Step(1, decodes=5000, kv_tokens=5000 * 100))
    assert set(model.outside) == {"head", "decode_attention"}


def test_more_work_never_takes_less_time(a100):
    model = LatencyModel(a100)
    decode = [model.device_ns(Step(0, decodes=n, kv_tokens=n * 500)) for n in range(1, 400)]
    prefill = [model.device_ns(Step(0, chunks={0: Chunk(0, n, True)})) for n in range(1, 4000, 13)]
    context = [model.device_ns(Step(0, chunks={0: Chunk(n, 64, True)})) for n in range(0, 4000, 13)]
    for each in (decode, prefill, context):
        assert each == sorted(each)


def test_a_mixed_step_is_the_sum_of_its_parts_but_for_weights_read_once():
    model = LatencyModel(small_profile())
    chunk, decodes = Step(0, chunks={0: Chunk(0, 64, True)}), Step(0, decodes=8, kv_tokens=800)
    mixed = Step(0, chunks={0: Chunk(0, 64, True)}, decodes=8, kv_tokens=800)
    fixed_ns = LatencyModel(small_profile()).device_ns(Step(0, chunks={0: Chunk(0, 1, False)})) - 10_000
    separate = model.device_ns(chunk) + model.device_ns(decodes)
    assert separate - 1.2 * fixed_ns < model.device_ns(mixed) < separate


def test_the_roofline_of_a_decode_step_is_the_time_to_read_weights_and_cache(a100):
    weights = 2 * (LLAMA3.num_parameters - LLAMA3.vocab_size * LLAMA3.hidden_size)  # the embedding is not read whole
    cache = 32 * 1000 * LLAMA3.kv_bytes_per_token(2)
    floor_ms = (weights + cache) / 2039e9 * 1e3
    step = Step(0, decodes=32, kv_tokens=32 * 999)
    assert LatencyModel(a100).device_ns(step) / 1e6 == pytest.approx(floor_ms, rel=0.03)


def test_a_model_that_does_not_fit_the_card_is_refused():
    with pytest.raises(TandemError, match="llama-2-13b"):
        roofline_profile("rtx4090", load_model_config("llama-2-13b"))


def test_the_profilers_plan_spans_what_the_config_allows():
    config = ServingConfig(num_blocks=100, max_seqs=10, max_batched_tokens=200, max_model_len=300)
    passes = plan(config)
    assert max(one.tokens for one in passes) == 200
    assert max(len(one.decodes) for one in passes) == 10
    assert max(context + tokens for one in passes for tokens, context in one.chunks) == 300
    for one in passes:
        blocks = one.step(config.block_size).blocks
        used = [block for each in blocks.values() for block in each]
        assert len(used) == len(set(used)) and max(used) < config.num_blocks
    assert count_passes(config) > len(passes)
    smaller = plan(dataclasses.replace(config, max_seqs=2, max_batched_tokens=20))
    assert len(smaller) < len(passes)
