"""Another model on a profiled GPU: equal shapes are reused, the rest is estimated, and the data sheet says which."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_device_profilers import CONFIG, known_profile
from test_drift import KnownExecutor
from test_golden import CHUNKED, OF_7B, by_kind

from engine.config import ServingConfig
from engine.model.config import ModelConfig, load_model_config
from engine.step import Chunk, Step, StepLoad
from sim.latency_model import LatencyModel
from sim.memory_model import gpu_blocks
from sim.profile.format import Profile, find_profile, read_profile
from sim.profiling.drift import DriftCheck
from sim.sources.derive import PRODUCTS, derive_profile
from sim.sources.importers import aiconfigurator, import_profile
from sim.sources.roofline import data_sheet, roofline_profile
from traces.errors import TandemError

LLAMA3, LLAMA2 = load_model_config("llama-3-8b"), load_model_config("llama-2-7b")
DEEP = replace(LLAMA3, name="deep", num_layers=64)
TANDEM = Path(sys.executable).with_name("tandem")
PAGE = (Path(__file__).parents[1] / "docs/profiles.md").read_text()
PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "a100"
needs_published = pytest.mark.skipif(
    not PUBLISHED.exists(), reason="the published measurements, which are not ours to ship, are not here"
)


def derived(source: Profile, model: ModelConfig) -> Profile:
    return derive_profile(source, model, "source")


def shipped(name: str = "a100-80gb/llama-3-8b") -> Profile:
    return read_profile(find_profile(Path(name)))


def how(profile: Profile) -> dict[str, str]:
    return {table: origin["how"] for table, origin in profile.meta.tables.items()}


# -- what is reused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a100-80gb/llama-3-8b", "rtx4090/llama-3-8b"])
def test_the_same_model_keeps_every_time_and_all_is_reused(name):
    source = shipped(name)
    again = derived(source, LLAMA3)
    for table, rows in source.tables.items():
        keys = [key for key in rows[0] if key not in ("time_us", "spread")]
        times = [
            {tuple(row[key] for key in keys): row["time_us"] for row in each} for each in (rows, again.tables[table])
        ]
        assert times[0] == pytest.approx(times[1])
    assert set(how(again).values()) == {"reused"}


def test_more_layers_of_the_same_shape_take_so_many_times_as_long():
    source = shipped("rtx4090/llama-3-8b")
    deep = derived(source, DEEP)
    assert how(deep) == {
        "dense": "scaled",
        "prefill_attention": "scaled",
        "decode_attention": "scaled",
        "mixed_decode_attention": "scaled",
        "head": "reused",
        "host": "reused",
        "swap": "estimated",
    }
    step = Step(0, decodes=8, load=StepLoad(kv_tokens=8000, kv_squares=8 * 1000**2))
    once, twice = (LatencyModel(each).parts_us(step) for each in (source, deep))
    assert twice["decode_attention"] == pytest.approx(2 * once["decode_attention"])
    assert twice["dense"] == pytest.approx(2 * once["dense"]) and twice["head"] == once["head"]


def test_a_matrix_of_equal_shape_is_reused_under_whatever_name_it_was_measured():
    shape = replace(LLAMA3, name="odd", intermediate_size=2048)  # gate_up is 4096 x 4096, as o is
    made = derived(shipped(), shape)
    times = {(row["op"], row["tokens"]): row["time_us"] for row in made.tables["dense"]}
    assert times["gate_up", 512] == times["o", 512]
    assert "gate_up: as o (n 4096, k 4096) of llama-3-8b" in made.meta.tables["dense"]["rules"][1]


# -- what is estimated ---------------------------------------------------------------------------------------

SHAPES = st.builds(
    lambda hidden, inner, layers, heads, vocab: replace(
        LLAMA3,
        name="drawn",
        hidden_size=256 * hidden,
        intermediate_size=256 * inner,
        num_layers=layers,
        num_heads=8 * heads,
        vocab_size=1000 * vocab,
    ),
    *(st.integers(1, most) for most in (20, 60, 40, 6, 200)),
)


@given(SHAPES)
def test_on_a_card_that_runs_at_its_roofline_the_estimate_is_the_roofline(shape):
    made, true = derived(roofline_profile("h200", LLAMA3), shape), roofline_profile("h200", shape)
    for table in ("dense", "head"):
        assert [row["time_us"] for row in made.tables[table]] == pytest.approx(
            [row["time_us"] for row in true.tables[table]]
        )
    last = [each.tables["prefill_attention"][-1]["time_us"] for each in (made, true)]
    assert last[0] == pytest.approx(last[1], rel=0.01)


def slower(profile: Profile, fixed_us: float) -> Profile:
    """Every operation by a fixed time in every layer."""
    more = fixed_us * profile.model.num_layers
    dense = [row | {"time_us": row["time_us"] + more} for row in profile.tables["dense"]]
    return Profile(profile.meta, profile.tables | {"dense": dense})


@given(SHAPES)
def test_a_time_that_products_take_whatever_their_weights_is_found_and_stays(shape):
    made = derived(slower(roofline_profile("h200", LLAMA3), 3.0), shape)
    true = slower(roofline_profile("h200", shape), 3.0)
    times = [[row["time_us"] for row in each.tables["dense"] if row["op"] in PRODUCTS] for each in (made, true)]
    assert times[0] == pytest.approx(times[1])


def test_a_least_time_stays_when_attention_gets_four_times_the_keys_and_values():
    source = shipped()
    made = derived(source, LLAMA2)
    for row, old in zip(made.tables["decode_attention"], source.tables["decode_attention"], strict=True):
        assert 1 <= row["time_us"] / old["time_us"] <= 4
    largest = max(
        zip(made.tables["decode_attention"], source.tables["decode_attention"], strict=True),
        key=lambda p: p[1]["time_us"],
    )
    assert largest[0]["time_us"] / largest[1]["time_us"] == pytest.approx(3.9, abs=0.1)


def gpu_profile() -> Profile:
    """As `tandem profile` measures one on a GPU: captured steps of 5 ms and some."""
    profile, _ = known_profile()
    device = data_sheet("h100-80gb").device
    return replace(profile, meta=replace(profile.meta, device=device, dtype="float16", model=LLAMA3))


def test_a_captured_step_shrinks_with_its_operations():
    half = replace(LLAMA3, name="half", num_layers=16, vocab_size=LLAMA3.vocab_size // 2)
    source = gpu_profile()
    made = derived(source, half)
    step = Step(0, chunks={0: Chunk(0, 100, True)}, decodes=8, load=StepLoad(kv_tokens=800))
    ratio = LatencyModel(made).device_ns(step) / LatencyModel(source).device_ns(step)
    assert ratio == pytest.approx(0.5, abs=0.01)
    assert how(made)["graph"] == "estimated" and made.meta.graphs == source.meta.graphs


# -- what the data sheet says --------------------------------------------------------------------------------


def test_the_result_says_what_it_comes_from_and_claims_no_error_of_its_own():
    made = derived(shipped(), LLAMA2)
    assert made.model == LLAMA2 and made.meta.derived == {"from": "source", "model": "llama-3-8b"}
    assert made.meta.source.startswith("derived from source: nothing of llama-2-7b was measured; imported")
    assert made.meta.held_out.keys() == {"rule"}
    tables = made.meta.tables
    assert tables["dense"]["how"] == "estimated" and tables["dense"]["of"] == "measured"
    assert tables["host"] == {"how": "reused", "rules": ["of llama-3-8b"], "of": "zero"}
    assert any(rule.startswith("o: as o (n 4096, k 4096)") for rule in tables["dense"]["rules"])
    assert all(origin["rules"] for origin in tables.values())


def test_what_was_estimated_can_be_checked_on_the_card():
    half = replace(LLAMA3, name="half", num_layers=16)
    source = gpu_profile()
    meta = replace(source.meta, kernels="Triton", limits=CONFIG, device=data_sheet("h100-80gb").device)
    made = derived(Profile(meta, source.tables), half)
    executor = KnownExecutor()
    executor.model = half
    found = {each.table: each for each in DriftCheck(executor, made).run()}
    assert found.keys() == {"graph", "dense", "head", "prefill_attention", "decode_attention"}
    assert found["dense"].median == pytest.approx(1.0) and found["head"].median == 0  # the known GPU has all its layers


def test_its_kv_blocks_are_those_of_the_other_model():
    config = ServingConfig(1, max_seqs=512, max_model_len=4096)
    assert gpu_blocks(derived(shipped(), LLAMA2), config) < gpu_blocks(shipped(), config) / 3


def test_what_cannot_be_derived_is_refused():
    once = derived(shipped(), LLAMA2)
    with pytest.raises(TandemError, match="source is itself derived"):
        derived(once, LLAMA3)
    source = gpu_profile()
    with pytest.raises(TandemError, match=r"no data sheet of abacus in sim/sources/hardware: it has NVIDIA A100"):
        derived(replace(source, meta=replace(source.meta, device="abacus")), LLAMA2)
    odd = [row | {"op": "router"} for row in source.tables["dense"]]
    with pytest.raises(TandemError, match="'router' is no operation that is known"):
        derived(Profile(source.meta, source.tables | {"dense": odd}), LLAMA2)


def test_the_command_writes_a_profile_and_says_what_is_estimated(tmp_path):
    args = ("profile", "derive", "--from", "a100-80gb/llama-3-8b", "--model", "llama-2-7b", "--out", "p")
    done = subprocess.run([TANDEM, *args], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "dense estimated: o: as o (n 4096, k 4096) of llama-3-8b\n" in done.stderr
    assert read_profile(tmp_path / "p").model == LLAMA2


# -- against what was measured -------------------------------------------------------------------------------


def off(made: dict, true: dict) -> tuple[float, float]:
    """Median and P95 of the relative errors."""
    errors = [abs(made[key] / true[key] - 1) for key in made.keys() & true.keys()]
    assert len(errors) > 15
    return float(np.median(errors)), float(np.percentile(errors, 95))


def layers_us(profile: Profile) -> dict[int, float]:
    latency = LatencyModel(profile)
    tokens = {row["tokens"] for row in profile.tables["dense"]}
    return {count: latency.parts_us(Step(0, chunks={0: Chunk(0, count, False)}))["dense"] for count in tokens}


@needs_published
@pytest.mark.parametrize(("old", "new"), [(LLAMA3, LLAMA2), (LLAMA2, LLAMA3)], ids=lambda model: model.name)
def test_the_layers_of_one_model_are_derived_from_the_others_as_vidur_measured_both(old, new):
    files = {LLAMA3.name: "vidur_llama3_8b_mlp.csv", LLAMA2.name: "vidur_llama2_7b_mlp.csv"}
    measured = {each.name: import_profile([PUBLISHED / files[each.name]], each, "a100-80gb") for each in (old, new)}
    middle, p95 = off(layers_us(derived(measured[old.name], new)), layers_us(measured[new.name]))
    assert middle < 0.03 and p95 < 0.09


FEWER = replace(LLAMA3, name="4 KV heads", num_kv_heads=4)
AS_MEASURED = {  # errors of prefill and of decode, median and P95; no decodes of 32 KV heads were measured
    LLAMA2: ((0.04, 0.18), None),
    load_model_config("llama-3.2-3b"): ((0.035, 0.11), (0.02, 0.09)),
    FEWER: ((0.011, 0.05), (0.12, 0.26)),
}


@needs_published
@pytest.mark.parametrize("model", AS_MEASURED, ids=lambda model: model.name)
def test_attention_of_other_heads_is_derived_as_aiconfigurator_measured_it(model):
    made = derived(import_profile([PUBLISHED], LLAMA3), model)

    def rows(name: str) -> list:
        found = aiconfigurator._attention(PUBLISHED / name, model)
        return [row | {"time_us": 1000 * model.num_layers * row["latency"]} for row in found]

    prefill, decode = AS_MEASURED[model]
    true = {row["isl"]: row["time_us"] for row in rows(aiconfigurator.PREFILL) if row["batch_size"] == 1}
    ours = {row["chunk"]: row["time_us"] for row in made.tables["prefill_attention"] if not row["context"]}
    assert off(ours, true) < prefill and off(ours, true)[1] < prefill[1]
    if decode:
        true = {(row["batch_size"], row["step"] + 1): row["time_us"] for row in rows(aiconfigurator.DECODE)}
        ours = {
            (row["sequences"], row["kv_tokens"] / row["sequences"]): row["time_us"]
            for row in made.tables["decode_attention"]
        }
        assert off(ours, true) < decode and off(ours, true)[1] < decode[1]


@pytest.mark.parametrize(("source", "model", "run"), [("3-8b", "2-7b", OF_7B), ("2-7b", "3-8b", CHUNKED)])
def test_it_predicts_the_steps_of_a_run_that_the_other_model_served_as_the_page_says(source, model, run):
    profile = derived(shipped(f"h100-80gb/llama-{source}"), load_model_config(f"llama-{model}"))
    errors = by_kind(run, profile)
    stated = re.search(rf"`h100-80gb/llama-{source}` \| `llama-{model}` \| \S+, (\S+) % \| \S+, (\S+) %", PAGE)
    assert [f"{100 * errors[kind]['mape']:.1f}" for kind in ("decode", "mixed")] == list(stated.groups())
