"""The limits of a run that nobody gave: they are the profile's, the model's and the memory's, and it says which."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from shadow import serve
from tiny_models import tiny_model

from analysis.jobs.limits import real_limits, simulated_limits
from analysis.jobs.options import Limits
from engine.config import ServingConfig
from engine.model.config import load_model_config
from engine.records import manifest
from engine.records.run_folder import RunRecords, read_run
from sim.profile.format import Profile, find_profile, read_profile, shipped_profiles
from sim.sources.derive import derive_profile
from sim.sources.roofline import roofline_profile
from traces.errors import TandemError
from traces.request import TraceRequest

TANDEM = Path(sys.executable).with_name("tandem")
OF_PROFILE = ("max_seqs", "max_batched_tokens", "max_model_len", "pipeline_depth", "num_blocks", "block_size")


def shipped(name: str) -> Profile:
    return read_profile(find_profile(Path(name)))


MEASURED = [name for name in shipped_profiles() if shipped(name).meta.limits]
IMPORTED = [name for name in shipped_profiles() if name not in MEASURED]
H100 = shipped("h100-80gb/llama-3-8b")


@pytest.mark.parametrize("name", MEASURED)
def test_a_simulation_assumes_what_its_profile_was_measured_within(name):
    profile = shipped(name)
    settled = simulated_limits(profile, Limits())
    assert {limit: getattr(settled.config, limit) for limit in OF_PROFILE} == {
        limit: getattr(profile.meta.limits, limit) for limit in OF_PROFILE
    }
    assert {settled.origins[limit] for limit in OF_PROFILE} == {"profile"}


def test_the_line_says_all_of_them_and_where_each_is_from():
    assert simulated_limits(H100, Limits()).line == (
        "limits: 256 sequences, 2,048 tokens a step, requests to 8,192 tokens, depth 2, 7,032 KV blocks of 64 (profile)"
    )
    assert simulated_limits(H100, Limits(max_seqs=1, pipeline_depth=1, num_cpu_blocks=9)).line == (
        "limits: 1 sequence (given); 2,048 tokens a step, requests to 8,192 tokens (profile); depth 1 (given); "
        "128 KV blocks of 64 (profile); 9 in host memory (given)"
    )


@pytest.mark.parametrize("name", IMPORTED)
def test_where_the_profile_knows_no_limits_they_are_a_gpus_the_models_and_its_memorys(name):
    settled = simulated_limits(shipped(name), Limits())
    config = settled.config
    assert (config.max_seqs, config.max_batched_tokens, config.pipeline_depth) == (256, 2048, 2)
    assert config.max_model_len == shipped(name).model.max_position_embeddings
    assert config.num_blocks * config.block_size > 4 * config.max_model_len
    origins = [settled.origins[limit] for limit in ("max_seqs", "max_model_len", "num_blocks")]
    assert origins == ["default", "model", "memory"]


def test_a_derived_profile_has_the_limits_of_its_source_up_to_the_models_positions():
    derived = derive_profile(H100, load_model_config("llama-2-7b"), "h100")
    settled = simulated_limits(derived, Limits())
    assert (settled.config.max_seqs, settled.config.max_model_len) == (256, 4096)
    assert settled.origins["max_model_len"] == "model" and settled.origins["num_blocks"] == "memory"
    assert settled.config.num_blocks == pytest.approx(1838, rel=0.01)  # as an H100 was found to hold


def test_a_longest_request_that_nobody_gave_fits_into_memory():
    gpu = roofline_profile("rtx4090", load_model_config("llama-3.1-8b"))
    settled = simulated_limits(gpu, Limits())
    assert settled.config.max_model_len == 131_072 // 4 and settled.origins["max_model_len"] == "memory"
    assert settled.config.num_blocks * 16 >= settled.config.max_model_len
    with pytest.raises(TandemError, match=r"one request of 131072 tokens .* lower"):
        simulated_limits(gpu, Limits(max_model_len=131_072))


def test_fewer_tokens_a_step_than_usual_sequences_are_fewer_sequences():
    settled = simulated_limits(H100, Limits(max_batched_tokens=100))
    assert settled.config.max_seqs == 100
    with pytest.raises(TandemError, match="below max_seqs"):
        simulated_limits(H100, Limits(max_batched_tokens=100, max_seqs=101))


# -- KV blocks ---------------------------------------------------------------------------------------------


def test_blocks_that_were_measured_are_as_many_bytes_of_another_size():
    settled = simulated_limits(H100, Limits(block_size=16))
    assert settled.config.num_blocks == 4 * 7032 and settled.origins["num_blocks"] == "profile"


@pytest.mark.parametrize(
    "wider",
    [{"max_seqs": 512}, {"max_batched_tokens": 65536}, {"max_model_len": 65401}],
    ids=lambda wider: next(iter(wider)),
)
def test_beyond_the_limits_they_were_measured_within_memory_says_how_many_there_are(wider):
    settled = simulated_limits(H100, Limits(**wider, allow_long_context=True))
    assert settled.origins["num_blocks"] == "memory"
    if "max_batched_tokens" in wider:  # 5,972 were measured on the GPU: tests/test_memory.py
        assert settled.config.num_blocks == pytest.approx(5972, rel=0.01)


def test_where_memory_is_not_known_either_the_number_stays_and_it_says_so():
    unknown = replace(H100, meta=replace(H100.meta, memory=None))
    assert not simulated_limits(unknown, Limits(max_seqs=128)).notes
    settled = simulated_limits(unknown, Limits(max_seqs=512))
    assert settled.config.num_blocks == 7032
    assert "measured within 256 sequences" in settled.notes[0] and "--kv-blocks" in settled.notes[0]


def test_the_models_last_position_may_be_asked_for_and_the_next_may_not():
    positions = H100.model.max_position_embeddings
    assert simulated_limits(H100, Limits(max_model_len=positions)).config.max_model_len == positions
    with pytest.raises(
        TandemError, match=f"requests to {positions + 1:,} tokens are beyond the {positions:,} positions"
    ):
        simulated_limits(H100, Limits(max_model_len=positions + 1))


@pytest.mark.parametrize(("longer", "outcome"), [(0, "length"), (1, "rejected")])
def test_a_request_of_just_the_longest_length_is_served_and_a_longer_one_is_rejected(longer, outcome):
    config = ServingConfig(num_blocks=100, max_model_len=64)
    _, (request,) = serve([TraceRequest(0, 0, 50, 14 + longer, 14 + longer)], config)
    assert request.outcome == outcome


# -- like a run --------------------------------------------------------------------------------------------


def run_of(config: ServingConfig) -> RunRecords:
    return RunRecords({"system": manifest.system("H100", config)}, {})


def test_like_a_run_takes_all_limits_from_it():
    config = ServingConfig(77, max_seqs=3, scheduler="fcfs", pipeline_depth=1, num_cpu_blocks=5, prefix_caching=True)
    settled = simulated_limits(H100, Limits(), run_of(config))
    assert settled.config == config and set(settled.origins.values()) == {"that run"}
    assert simulated_limits(H100, Limits(max_seqs=4), run_of(config)).config == replace(config, max_seqs=4)


def test_like_a_run_with_other_blocks_has_as_many_bytes_of_them():
    config = ServingConfig(1000, block_size=64, num_cpu_blocks=10)
    settled = simulated_limits(H100, Limits(block_size=16), run_of(config))
    assert (settled.config.num_blocks, settled.config.num_cpu_blocks) == (4000, 40)


# -- the model's positions ---------------------------------------------------------------------------------


def test_requests_beyond_the_models_positions_are_refused_unless_allowed_by_name():
    with pytest.raises(TandemError, match="8,193 tokens are beyond the 8,192 positions of llama-3-8b"):
        simulated_limits(H100, Limits(max_model_len=8193))
    settled = simulated_limits(H100, Limits(max_model_len=8193, allow_long_context=True))
    assert settled.config.max_model_len == 8193 and settled.facts["allow_long_context"] is True
    assert "allow_long_context" not in simulated_limits(H100, Limits(max_model_len=8192)).facts


# -- real runs ---------------------------------------------------------------------------------------------


def machine(captures: bool, holds: int) -> SimpleNamespace:
    """An executor of Llama-3.1-8B on a machine whose memory holds so many tokens."""

    def measure_blocks(config: ServingConfig) -> int:
        if config.max_model_len > holds:
            raise TandemError("one request of the longest length does not fit")
        return holds // config.block_size

    model = load_model_config("llama-3.1-8b")
    return SimpleNamespace(model=model, captures=captures, block_size=64, measure_blocks=measure_blocks)


@pytest.mark.parametrize(("captures", "usual"), [(True, (256, 2048, 2)), (False, (32, 2048, 1))])
def test_a_real_run_has_what_the_model_and_the_machine_hold(captures, usual):
    settled = real_limits(machine(captures, 10**6), Limits())
    config = settled.config
    assert (config.max_seqs, config.max_batched_tokens, config.pipeline_depth) == usual
    assert (config.max_model_len, config.num_blocks) == (131_072, 10**6 // 64)
    small = real_limits(machine(captures, 40_000), Limits())
    assert (small.config.max_model_len, small.origins["max_model_len"]) == (32_768, "memory")
    with pytest.raises(TandemError, match="does not fit"):
        real_limits(machine(captures, 40_000), Limits(max_model_len=131_072))
    with pytest.raises(TandemError, match="does not fit"):
        real_limits(machine(captures, 1000), Limits())


# -- the command line --------------------------------------------------------------------------------------


def tandem(*args: object, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [TANDEM, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=check)


def test_an_h100_serves_20_requests_a_second_without_queues_when_nothing_else_is_said(tmp_path):
    tandem("trace", "synthetic", "--rate", 20, "--requests", 300, "--out", "t.parquet", cwd=tmp_path)
    done = tandem("simulate", "-t", "t.parquet", "-p", "h100-80gb/llama-3-8b", "-o", "run", "--json", cwd=tmp_path)
    summary, made = json.loads(done.stdout), read_run(tmp_path / "run").manifest
    assert done.stderr.startswith(f"{simulated_limits(H100, Limits()).line}\n")
    assert summary["completed"] == 300 and summary["mean_ttft_ms"] < 50
    assert made["system"] == manifest.system(H100.meta.device, simulated_limits(H100, Limits()).config)
    assert set(made["provenance"]["limits"].values()) == {"profile"}


def test_rejected_requests_are_spoken_of(tmp_path):
    tandem("trace", "synthetic", "--prompt", "uniform:8000:8400", "--requests", 50, "--out", "t.parquet", cwd=tmp_path)
    simulate = ("simulate", "-t", "t.parquet", "-p", "h100-80gb/llama-3-8b")
    done = tandem(*simulate, "-o", "run", "--json", cwd=tmp_path)
    rejected = json.loads(done.stdout)["rejected"]
    assert 0 < rejected <= 50 and f"note: {rejected} of 50 requests were rejected: prompt + max_tokens" in done.stderr
    longer = ("--max-model-len", 20_000, "--allow-long-context", "--json")
    done = tandem(*simulate, *longer, "-o", "long", cwd=tmp_path)
    assert json.loads(done.stdout)["rejected"] == 0 and "rejected" not in done.stderr
    assert read_run(tmp_path / "long").manifest["provenance"]["allow_long_context"] is True


def test_a_real_run_says_and_records_its_limits(tmp_path):
    tiny_model(vocab_size=300).save_pretrained(tmp_path / "model")
    shape = ("--prompt", "fixed:300", "--output", "fixed:4", "--requests", 2)
    tandem("trace", "synthetic", *shape, "--out", "t.parquet", cwd=tmp_path)
    args = ("run", "-t", "t.parquet", "-m", "model", "--device", "cpu", "-o", "run", "--json")
    done = tandem(*args, cwd=tmp_path, check=False)
    assert done.returncode == 1  # nobody could be served
    assert "limits: 32 sequences, 2,048 tokens a step (default); requests to 256 tokens (model)" in done.stderr
    assert "note: 2 of 2 requests were rejected: prompt + max_tokens above --max-model-len (256)" in done.stderr
    provenance = read_run(tmp_path / "run").manifest["provenance"]
    assert provenance["limits"]["max_model_len"] == "model" and provenance["limits"]["num_blocks"] == "memory"
    assert asdict(manifest.config_of(read_run(tmp_path / "run").manifest))["max_model_len"] == 256
