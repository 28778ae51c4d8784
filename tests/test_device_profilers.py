"""The profile that a GPU profiler makes of known times gives them back."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from shadow import small_profile

from engine.config import ServingConfig
from engine.model.graph_sizes import GraphSizes
from engine.step import Step
from sim.latency_model import LatencyModel
from sim.profile.format import Profile, read_profile, write_profile
from sim.profiling.batches import BatchShape
from sim.profiling.gpu import GpuProfiler
from sim.profiling.held_out import HeldOutBatch, held_out_batches, held_out_rows, with_held_out_error

CONFIG = ServingConfig(num_blocks=2000, block_size=64, max_seqs=64, max_batched_tokens=4096, max_model_len=2048)
SIZES = GraphSizes.within(CONFIG.max_seqs, CONFIG.max_batched_tokens)
OPERATIONS = ("qkv", "down")


def whole_us(kind: str, rows: int) -> float:
    """A captured step: it reads the weights, computes on its rows, and samples."""
    return 5000 + 20.0 * rows + (100 if kind == "mixed" else 50)


class KnownMeter:
    """Stands for a GPU whose times are a formula: KV tokens are read at 20 to the microsecond."""

    def stream_us(self, batches: list[BatchShape]) -> list[float]:
        return [self.step_us(batch.steps(CONFIG.block_size)[0]) for batch in batches]

    def operations_us(self, tokens: int) -> dict[str, float]:
        return dict.fromkeys(OPERATIONS, 2000 + 10.0 * tokens)

    def attention_us(self, batch: BatchShape) -> float:
        return self.attended_us(batch.steps(CONFIG.block_size)[0])

    def attended_us(self, step: Step) -> float:
        pairs = sum(tokens * (start + tokens / 2) for start, tokens, _ in step.chunks.values())
        return (step.load.kv_tokens + step.decodes) / 20 + (200 if step.chunks else 0) + pairs / 1000

    def head_us(self, samples: int) -> float:
        return 300 + samples

    def steps_us(self, requests: object, steps: list[Step]) -> list[float]:
        return [self.step_us(step) for step in steps]

    def step_us(self, step: Step) -> float:
        tokens = step.prefill_tokens + step.decodes
        rows = SIZES.rows(tokens, len(step.chunks))
        if rows is None:
            samples = step.decodes + len(step.chunks)
            time_us = sum(self.operations_us(tokens).values()) + self.head_us(samples)
        else:
            time_us = whole_us("mixed" if step.chunks else "decode", rows)
        return time_us + self.attended_us(step)


class KnownGpu:
    captures = True
    model = SimpleNamespace(vocab_size=100)

    def meter(self, config: ServingConfig) -> KnownMeter:
        return KnownMeter()


@pytest.fixture(scope="module")
def measured() -> tuple[Profile, GpuProfiler]:
    return known_profile()


class HeldUpMeter(KnownMeter):
    """The first time that a point is asked for, something else runs besides."""

    def __init__(self) -> None:
        self.asked: set[object] = set()

    def held_up(self, key: object) -> int:
        first = key not in self.asked
        self.asked.add(key)
        return 2 if first else 1

    def operations_us(self, tokens: int) -> dict[str, float]:
        return {name: of * self.held_up((name, tokens)) for name, of in super().operations_us(tokens).items()}

    def attention_us(self, batch: BatchShape) -> float:
        return super().attention_us(batch) * self.held_up(batch)

    def head_us(self, samples: int) -> float:
        return super().head_us(samples) * self.held_up(("head", samples))


def test_a_round_that_was_held_up_does_not_count(measured, monkeypatch):
    profile, _ = measured
    monkeypatch.setattr(KnownGpu, "meter", lambda gpu, config: HeldUpMeter())
    held_up, _ = known_profile()
    for table in ("dense", "head", "decode_attention", "prefill_attention", "graph"):
        assert held_up.tables[table] == profile.tables[table]


def known_profile() -> tuple[Profile, GpuProfiler]:
    profiler = GpuProfiler(KnownGpu(), CONFIG)
    with profiler as device:
        tables = device.tables([sample for item in device.work for sample in device.measure(item)])
        tables["host"] = small_profile().tables["host"]
        tables["held_out"] = held_out_rows(HeldOutBatch(shape, device.batch_us(shape)) for shape in device.held_out)
    meta = replace(small_profile().meta, graphs=SIZES, block_size=CONFIG.block_size)
    return with_held_out_error(Profile(meta, tables)), profiler


def test_the_profile_predicts_batches_that_were_held_out(measured):
    profile, _ = measured
    error = profile.meta.held_out
    assert error["batches"] == 48 and set(error["by_kind"]) == {"decode", "mixed"}
    assert error["by_kind"]["decode"]["mape"] < 0.003
    assert error["by_kind"]["mixed"]["mape"] < 0.01


def test_the_batches_that_were_held_out_stay_with_the_profile(measured, tmp_path):
    profile, profiler = measured
    write_profile(profile, tmp_path / "p")
    again = read_profile(tmp_path / "p")
    assert held_out_batches(again) == held_out_batches(profile)
    assert [batch.shape for batch in held_out_batches(again)] == profiler.held_out
    assert with_held_out_error(again).meta == again.meta == profile.meta


def test_every_captured_size_is_a_point_of_the_table(measured):
    profile, _ = measured
    points = {(row["kind"], row["rows"]): row["time_us"] for row in profile.tables["graph"]}
    sizes = [("decode", rows) for rows in SIZES.decode] + [("mixed", rows) for rows in SIZES.mixed]
    assert points == pytest.approx({size: whole_us(*size) for size in sizes})


def test_attention_is_what_a_batch_takes_beyond_its_captured_step(measured):
    profile, _ = measured
    for row in profile.tables["decode_attention"]:
        assert row["time_us"] == pytest.approx(row["kv_tokens"] / 20, abs=row["sequences"] / 20)
    for row in profile.tables["prefill_attention"]:
        pairs = row["chunk"] * (row["context"] + row["chunk"] / 2)
        assert row["time_us"] == pytest.approx(200 + pairs / 1000, rel=0.01)


def test_a_step_too_large_to_be_captured_is_made_of_its_operations(measured):
    profile, _ = measured
    from engine.step import Chunk

    step = Step(0, chunks={0: Chunk(0, 1500, True), 1: Chunk(0, 1500, True)})
    latency = LatencyModel(profile)
    assert latency.parts_us(step)["padding"] == 0
    assert latency.device_ns(step) / 1000 == pytest.approx(KnownMeter().step_us(step), rel=0.02)


def test_every_batch_fits_the_limits(measured):
    _, profiler = measured
    for point in profiler.work:
        for step in point.shape.steps(CONFIG.block_size, 10) if point.shape else ():
            assert step.prefill_tokens + step.decodes <= CONFIG.max_batched_tokens
            assert step.load.running <= CONFIG.max_seqs
            assert all(max(blocks) < CONFIG.num_blocks for blocks in step.blocks.values())
