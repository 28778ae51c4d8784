"""The memory of a GPU: as many KV blocks as the executor found on one, and every term where it belongs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shadow import small_profile

from analysis.jobs.limits import simulated_limits
from analysis.jobs.options import Limits
from engine.config import ServingConfig
from engine.model.config import load_model_config
from sim.memory_model import Memory, gpu_blocks, step_bytes
from sim.profile.format import find_profile, read_profile
from sim.sources.roofline import data_sheet, roofline_profile
from traces.errors import TandemError

LLAMA3 = load_model_config("llama-3-8b")
H100_GIB = data_sheet("h100-80gb").memory_gib
MEASURED = {  # KV blocks that the executor found on an H100: tests/golden, and `tandem bench forward`
    ServingConfig(1, block_size=64, max_seqs=256, max_batched_tokens=2048, max_model_len=2048): 7032,
    ServingConfig(1, block_size=64, max_seqs=256, max_batched_tokens=65536, max_model_len=65401): 5972,
}
TANDEM = Path(sys.executable).with_name("tandem")


@pytest.mark.parametrize("config", MEASURED, ids=lambda config: f"{config.max_batched_tokens} tokens")
def test_the_h100_holds_as_many_blocks_as_were_measured_there(config):
    predicted = Memory.of(H100_GIB, LLAMA3, "float16", config).blocks
    assert predicted == pytest.approx(MEASURED[config], rel=0.002)


def test_an_h200_holds_as_many_as_its_profile_found():
    meta = read_profile(find_profile(Path("h200/llama-3-8b"))).meta
    predicted = Memory.of(data_sheet("h200").memory_gib, LLAMA3, "float16", meta.limits).blocks
    assert predicted == pytest.approx(meta.kv_blocks, rel=0.002)


def test_it_holds_as_many_of_a_model_without_grouped_queries_as_its_profile_found():
    meta = read_profile(find_profile(Path("h100-80gb/llama-2-7b"))).meta
    predicted = Memory.of(H100_GIB, load_model_config("llama-2-7b"), "float16", meta.limits).blocks
    assert predicted == pytest.approx(meta.kv_blocks, rel=0.002)


def test_what_a_larger_step_takes_follows_from_the_model_without_any_constant():
    small, large = MEASURED
    taken = step_bytes(LLAMA3, 2, 65536, 256) - step_bytes(LLAMA3, 2, 2048, 256)
    assert taken / 2**23 == pytest.approx(MEASURED[small] - MEASURED[large], rel=0.005)


def test_the_terms_add_up_to_what_may_be_used():
    memory = Memory.of(H100_GIB, LLAMA3, "float16", next(iter(MEASURED)))
    names = {field.name for field in fields(memory)} - {"usable", "block", "most"}
    assert memory.usable == memory.room + sum(getattr(memory, name) for name in names)
    assert memory.weights == 2 * 8_030_261_248 and memory.block == 64 * 131_072


@given(st.integers(1, 256), st.integers(2048, 65536), st.integers(64, 65536))
def test_higher_limits_never_leave_more_room(seqs, tokens, length):
    config = ServingConfig(1, max_seqs=seqs, max_batched_tokens=tokens, max_model_len=length)
    room = Memory.of(80, LLAMA3, "float16", config).room
    for name in ("max_seqs", "max_batched_tokens", "max_model_len"):
        higher = replace(config, **{name: getattr(config, name) + 256})
        assert Memory.of(80, LLAMA3, "float16", higher).room <= room


def test_logits_count_where_nothing_of_the_layers_is_large_enough_for_them():
    few, many = (step_bytes(LLAMA3, 2, 64, samples) for samples in (1, 64))
    assert many - few == 2 * 64 * LLAMA3.vocab_size
    assert step_bytes(LLAMA3, 2, 2048, 256) == step_bytes(LLAMA3, 2, 2048, 1)


def test_a_simulation_gets_what_its_card_holds_within_its_limits():
    profile = read_profile(find_profile(Path("rtx4090/llama-3-8b")))
    blocks = {
        tokens: simulated_limits(profile, Limits(max_seqs=256, max_batched_tokens=tokens)).config.num_blocks
        for tokens in (512, 2048, 8192)
    }
    assert blocks[512] > blocks[2048] > blocks[8192] > 0
    assert simulated_limits(profile, Limits(num_blocks=7)).config.num_blocks == 7


def test_a_simulation_gets_no_more_than_its_limits_can_use():
    h200 = roofline_profile("h200", LLAMA3)
    config = ServingConfig(1, max_seqs=4, max_model_len=160)
    assert gpu_blocks(h200, config) == 40


def test_a_number_that_was_measured_stands():
    profile = small_profile()
    measured = replace(profile, meta=replace(profile.meta, kv_blocks=77))
    assert gpu_blocks(measured, ServingConfig(1)) == 77


def test_limits_that_leave_no_room_are_refused_with_what_takes_it():
    rtx4090 = roofline_profile("rtx4090", LLAMA3)
    with pytest.raises(TandemError, match=r"llama-3-8b float16 on .* weights take 15.0 GiB, a full step .* lower"):
        gpu_blocks(rtx4090, ServingConfig(1, max_batched_tokens=65536))
    with pytest.raises(TandemError, match="does not say what memory its GPU has"):
        gpu_blocks(replace(rtx4090, meta=replace(rtx4090.meta, data_sheet=None, memory=None)), ServingConfig(1))


def tandem(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TANDEM, *map(str, args)], capture_output=True, text=True, timeout=60, check=False)


def test_tandem_memory_shows_every_term():
    asked = ("memory", "h100-80gb", "--model", "llama-3-8b", "--max-seqs", 256)
    terms = json.loads(tandem(*asked, "--json").stdout)
    assert terms["kv_blocks"] == pytest.approx(7032, rel=0.002)
    shown = tandem(*asked).stdout
    assert f"a run gets {terms['kv_blocks']:,} KV blocks." in shown
    assert all(name in shown for name in terms if name not in ("block", "most", "room", "kv_blocks"))
    refused = tandem(*asked, "--dtype", "int8")
    assert refused.returncode == 2 and refused.stderr == (
        "tandem: unknown dtype 'int8': choose float32, float16, bfloat16\n"
    )
