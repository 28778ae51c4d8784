"""Latency profiles: what is written is read back, what is wrong is refused, and lookups do what they say."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from shadow import small_profile

from analysis.jobs.profile import check_profile, measure
from analysis.report.console_progress import ConsoleProgress
from engine.config import ServingConfig
from engine.executor.batch_state import RunningBatch
from engine.model.config import load_model_config
from engine.model.graph_sizes import GraphSizes
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from engine.step import Chunk, Step, StepLoad
from sim.latency_model import LatencyModel
from sim.profile.curves import Curve, Surface
from sim.profile.format import Profile, read_profile, shipped_profiles, write_profile
from sim.profiling.batches import BatchShape
from sim.profiling.cpu import grid
from sim.profiling.profiler import Notes
from sim.profiling.samples import Sample
from sim.sources.roofline import roofline_profile
from sim.terms import DecodeAttention
from traces.errors import TandemError

LLAMA3 = load_model_config("llama-3-8b")
times = st.floats(0, 1e6)


@pytest.fixture(scope="module")
def a100() -> Profile:
    return roofline_profile("a100-80gb", LLAMA3)


def test_a_profile_is_read_back_as_written(a100, tmp_path):
    write_profile(a100, tmp_path / "p")
    again = read_profile(tmp_path / "p")
    assert again == a100 and again.model == LLAMA3
    assert again.name == "llama-3-8b float16 on NVIDIA A100-SXM4-80GB"


@pytest.mark.parametrize("name", shipped_profiles())
def test_what_a_shipped_profile_says_is_written_as_it_was_read(name, tmp_path):
    folder = shipped_profiles()[name]
    write_profile(read_profile(folder), tmp_path / "p")
    before, after = (yaml.safe_load((path / "meta.yaml").read_text()) for path in (folder, tmp_path / "p"))
    assert before.pop("limits", {}).items() <= after.pop("limits", {}).items()  # rules of today are written out
    assert before == after
    assert read_profile(tmp_path / "p") == read_profile(folder)


def test_a_profile_replaces_only_what_it_may(a100, tmp_path):
    write_profile(a100, tmp_path / "p")
    other = roofline_profile("h200", LLAMA3)
    with pytest.raises(TandemError, match="holds a profile: choose another --out, or add --overwrite"):
        write_profile(other, tmp_path / "p")
    assert read_profile(tmp_path / "p").name == a100.name
    write_profile(other, tmp_path / "p", overwrite=True)
    assert read_profile(tmp_path / "p").name == other.name


def test_a_profile_never_replaces_anything_else(a100, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/final.txt").write_text("irreplaceable")
    with pytest.raises(TandemError, match="not a profile"):
        write_profile(a100, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis/final.txt").read_text() == "irreplaceable"


def test_the_run_beside_a_profile_is_replaced_only_by_a_profile_that_goes_on(tmp_path):
    RunRecords({}, Recorder().tables()).write(tmp_path / "p.calibration")
    with pytest.raises(TandemError, match=r"p\.calibration holds a run"):
        measure(None, ServingConfig(1), tmp_path / "p", ConsoleProgress(Console(quiet=True)))
    (tmp_path / "p.partial.jsonl").write_text("begun\n")
    with pytest.raises(AttributeError):  # past the checks, to the executor that is missing here
        measure(None, ServingConfig(1), tmp_path / "p", ConsoleProgress(Console(quiet=True)))


def break_meta(folder, **changes):
    meta = yaml.safe_load((folder / "meta.yaml").read_text()) | changes
    (folder / "meta.yaml").write_text(yaml.safe_dump(meta))


def drop_meta(folder, name):
    meta = yaml.safe_load((folder / "meta.yaml").read_text())
    del meta[name]
    (folder / "meta.yaml").write_text(yaml.safe_dump(meta))


def rescale(file, factor):
    rows = [row | {"time_us": factor * row["time_us"]} for row in pq.read_table(file).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), file)


def rename(file):
    table = pq.read_table(file)
    pq.write_table(table.rename_columns([name.replace("time_us", "time_ms") for name in table.column_names]), file)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "meta.yaml").unlink(), "no meta.yaml"),
        (lambda folder: (folder / "meta.yaml").write_text("- just\n- a list"), "not profile schema"),
        (lambda folder: break_meta(folder, schema=99), "not profile schema"),
        (lambda folder: break_meta(folder, memory={"usable": 1}), r"meta.yaml: entry 'memory' is not as .* measure it"),
        (lambda folder: break_meta(folder, power={"memory_us": 1}), "meta.yaml: entry 'power' is not as .* calibrate"),
        (lambda folder: break_meta(folder, model="llama"), "meta.yaml: entry 'model' is not as Tandem writes it"),
        (lambda folder: drop_meta(folder, "dtype"), "meta.yaml: no entry 'dtype'"),
        (lambda folder: (folder / "dense.parquet").unlink(), "dense.parquet"),
        (lambda folder: (folder / "head.parquet").write_bytes(b"PAR1 torn"), "head.parquet"),
        (lambda folder: rescale(folder / "head.parquet", 1e-3), "head.parquet: .* another unit than microseconds"),
        (lambda folder: rename(folder / "head.parquet"), "head: no column time_us, only samples, time_ms, .* microsec"),
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
    model.device_ns(Step(0, decodes=4, load=StepLoad(kv_tokens=4000)))
    assert model.coverage() == {"lookups": 3, "beyond": {}}
    model.device_ns(Step(1, decodes=5000, load=StepLoad(kv_tokens=5000 * 100)))
    assert set(model.coverage()["beyond"]) == {"head", "decode_attention"}


def test_more_work_never_takes_less_time(a100):
    model = LatencyModel(a100)
    decode = [model.device_ns(Step(0, decodes=n, load=StepLoad(kv_tokens=n * 500))) for n in range(1, 400)]
    prefill = [model.device_ns(Step(0, chunks={0: Chunk(0, n, True)})) for n in range(1, 4000, 13)]
    context = [model.device_ns(Step(0, chunks={0: Chunk(n, 64, True)})) for n in range(0, 4000, 13)]
    for each in (decode, prefill, context):
        assert each == sorted(each)


def test_a_mixed_step_is_the_sum_of_its_parts_but_for_weights_read_once():
    model = LatencyModel(small_profile())
    chunk, decodes = Step(0, chunks={0: Chunk(0, 64, True)}), Step(0, decodes=8, load=StepLoad(kv_tokens=800))
    mixed = Step(0, chunks={0: Chunk(0, 64, True)}, decodes=8, load=StepLoad(kv_tokens=800))
    fixed_ns = LatencyModel(small_profile()).device_ns(Step(0, chunks={0: Chunk(0, 1, False)})) - 10_000
    separate = model.device_ns(chunk) + model.device_ns(decodes)
    assert separate - 1.2 * fixed_ns < model.device_ns(mixed) < separate


def test_the_roofline_of_a_decode_step_is_the_time_to_read_weights_and_cache(a100):
    weights = 2 * (LLAMA3.num_parameters - LLAMA3.vocab_size * LLAMA3.hidden_size)  # the embedding is not read whole
    cache = 32 * 1000 * LLAMA3.kv_bytes_per_token(2)
    floor_ms = (weights + cache) / 2039e9 * 1e3
    step = Step(0, decodes=32, load=StepLoad(kv_tokens=32 * 999))
    assert LatencyModel(a100).device_ns(step) / 1e6 == pytest.approx(floor_ms, rel=0.03)


def test_a_model_that_does_not_fit_the_card_is_refused():
    with pytest.raises(TandemError, match="llama-2-13b"):
        roofline_profile("rtx4090", load_model_config("llama-2-13b"))


def test_the_batches_of_a_cpu_profiler_span_what_the_config_allows():
    config = ServingConfig(num_blocks=100, max_seqs=10, max_batched_tokens=200, max_model_len=300)
    shapes = grid(config)
    assert max(shape.tokens for shape in shapes) == 200
    assert max(len(shape.decodes) for shape in shapes) == 10
    assert max(context + tokens for shape in shapes for tokens, context in shape.chunks) == 300
    for shape in shapes:
        (step,) = shape.steps(config.block_size)
        used = [block for each in step.blocks.values() for block in each]
        assert len(used) == len(set(used)) and max(used) < config.num_blocks
    smaller = grid(dataclasses.replace(config, max_seqs=2, max_batched_tokens=20))
    assert len(smaller) < len(shapes)


def test_a_batch_is_run_over_and_over_by_steps_that_a_data_plane_follows():
    one, config = BatchShape(((20, 0),), (30, 5)), ServingConfig(num_blocks=100, max_batched_tokens=200)
    running = RunningBatch(one.requests(1000, 4), None, 1000, config)
    for index, step in enumerate(one.steps(config.block_size, 4)):
        work = running.apply(step)
        assert work.decodes.contexts.tolist() == [30 + index, 5 + index]
        assert (step.load.kv_tokens, step.load.kv_squares) == (35 + 2 * index, (30 + index) ** 2 + (5 + index) ** 2)
        (prefill,) = work.prefills
        assert (prefill.start, len(prefill.token_ids)) == (0, 20)
        assert running.note(work, [7] * len(work.samplers)).stops == []


def test_a_batch_that_prefills_rests_while_its_decodes_go_on():
    one, config = BatchShape(((20, 0),), (30, 5)), ServingConfig(num_blocks=100, max_batched_tokens=200)
    steps = one.steps(config.block_size, 2, rests=2)
    running = RunningBatch(one.requests(1000, len(steps)), None, 1000, config)
    works = [running.apply(step) for step in steps]
    assert [len(work.prefills) for work in works] == [1, 0, 0, 1, 0, 0]
    assert [work.decodes.contexts.tolist() for work in works] == [[30 + n, 5 + n] for n in range(6)]


def test_decodes_have_the_context_imbalance_they_are_filed_under():
    config = ServingConfig(num_blocks=10_000, max_seqs=64, max_batched_tokens=200, max_model_len=4000)
    points = [(n, mean, imbalance) for n, mean, imbalance in DecodeAttention.points(config) if imbalance > 1]
    shapes = {point: BatchShape.decoding(*point) for point in points}
    fitting = {point: shape.decodes for point, shape in shapes.items() if shape.decodes_fit(config)}
    assert 0 < len(fitting) < len(points)
    for (count, _, imbalance), contexts in fitting.items():
        squares = sum(context**2 for context in contexts)
        assert count * squares / sum(contexts) ** 2 == pytest.approx(imbalance, rel=0.1)
        assert len(contexts) == count and max(contexts) < 4000


@given(st.integers(1, 400), st.floats(1, 5000))
def test_a_surface_at_one_place_is_a_curve(x, y):
    rows = roofline_profile("a100-80gb", LLAMA3).tables["decode_attention"]
    surface = Surface({(row["sequences"], row["kv_tokens"] / row["sequences"]): row["time_us"] for row in rows})
    assert surface.at(x)(y) == pytest.approx(surface(x, y))


def graph_profile() -> Profile:
    """A profile with captured steps of 1, 4 and 16 rows: 1 ms + 10 us a row; a chunk of 8 tokens attends for 50 us."""
    whole = small_profile()
    graph = [
        {"kind": kind, "rows": rows, "time_us": 1000 + 10 * rows, "spread": 0.0}
        for kind in ("decode", "mixed")
        for rows in (1, 4, 16)
    ]
    decode = [
        {"sequences": n, "kv_tokens": n * context, "imbalance": level, "time_us": n * context * level, "spread": 0.0}
        for n in (1, 16)
        for context in (1, 100)
        for level in (1.0, 2.0)
    ]
    prefill = [
        {"chunk": chunk, "context": context, "time_us": 40 + chunk, "spread": 0.0}
        for chunk in (1, 16)
        for context in (0, 100)
    ]
    graphs = GraphSizes(decode=(1, 4, 16), mixed=(1, 4, 16), max_seqs=16, max_prefills=4)
    tables = whole.tables | {"graph": graph, "decode_attention": decode, "prefill_attention": prefill}
    return Profile(dataclasses.replace(whole.meta, graphs=graphs), tables)


def test_a_step_costs_what_the_captured_step_that_holds_it_costs():
    latency = LatencyModel(graph_profile())
    parts = latency.parts_us(Step(0, decodes=5, load=StepLoad(kv_tokens=5 * 9, kv_squares=5 * 81)))
    assert parts["dense"] + parts["head"] == pytest.approx(1050)
    assert parts["padding"] == pytest.approx(110)
    assert parts["decode_attention"] == pytest.approx(50) and parts["imbalance"] == pytest.approx(0)


def test_imbalanced_contexts_cost_what_the_profile_says_of_them():
    latency = LatencyModel(graph_profile())
    contexts = [9] * 12 + [89] * 4
    one = Step(0, decodes=16, load=StepLoad(kv_tokens=sum(contexts), kv_squares=sum(each**2 for each in contexts)))
    imbalance = 16 * sum((each + 1) ** 2 for each in contexts) / (sum(contexts) + 16) ** 2
    assert imbalance > 1.9
    parts = latency.parts_us(one)
    assert parts["imbalance"] == pytest.approx(parts["decode_attention"] * (min(imbalance, 2) - 1))


def test_chunks_of_one_captured_step_attend_at_once():
    latency = LatencyModel(graph_profile())
    one, two = ({each: Chunk(0, 8, True) for each in range(count)} for count in (1, 2))
    attention = [latency.parts_us(Step(0, chunks=chunks))["prefill_attention"] for chunks in (one, two)]
    best_us = 56 / (16 * 108.5)  # of a pair of query and key: 16 tokens over 100 others
    assert attention == pytest.approx([48, 48 + 36 * best_us])


@pytest.mark.parametrize("part", ["dense", "head", "padding", "decode_attention", "imbalance"])
def test_an_ignored_part_counts_for_nothing(part):
    step = Step(0, decodes=5, load=StepLoad(kv_tokens=50, kv_squares=900))
    whole = LatencyModel(graph_profile())
    without = LatencyModel(graph_profile(), [part])
    assert whole.device_ns(step) - without.device_ns(step) == pytest.approx(1000 * whole.parts_us(step)[part], abs=2)


def test_an_interrupted_profile_goes_on_where_it_was(tmp_path):
    path, identity = tmp_path / "p.partial.jsonl", {"device": "this"}
    first = Notes.open(path, identity)
    assert first.next() is None
    first.add([Sample("head", (1,), 5.0)])
    first.add([Sample("head", (2,), 6.0)])
    with path.open("a") as file:
        file.write('[["head", [3], 7')  # the machine went away while this was written
    again = Notes.open(path, identity)
    assert [again.next(), again.next(), again.next()] == [
        [Sample("head", (1,), 5.0)],
        [Sample("head", (2,), 6.0)],
        None,
    ]
    assert Notes.open(path, {"device": "another"}).next() is None


def test_a_profile_without_held_out_batches_is_found_before_anything_is_served():
    profile = read_profile(shipped_profiles()["h100-80gb/llama-3-8b"])
    meta = profile.meta
    machine = SimpleNamespace(device=meta.device, dtype=meta.dtype, kernels=meta.kernels, model=meta.model)
    check_profile(profile, machine, profile.meta.measured_within)
    older = replace(profile, tables={name: rows for name, rows in profile.tables.items() if name != "held_out"})
    with pytest.raises(TandemError, match="keeps no held-out batches"):
        check_profile(older, machine, profile.meta.measured_within)
