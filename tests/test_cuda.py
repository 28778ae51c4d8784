"""The executor on a GPU: graphs, streams, two tiers of memory. The kernels alone are in test_kernels.py."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
from pathlib import Path

import pytest
import torch
from tiny_models import KINDS, save_number_tokenizer, tiny_model
from transformers import LlamaForCausalLM

from engine.config import ServingConfig
from engine.executor.batch import KVCache
from engine.executor.executor import Executor
from engine.records.manifest import config_of
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords, read_run
from engine.scheduler import POLICIES
from sim.memory_model import Memory
from sim.negative_controls import negative_controls
from sim.profiling.calibration import calibrate, calibration_load
from sim.profiling.profiler import measure_profile
from sim.replay import replay
from sim.simulate import predict
from traces.errors import TandemError
from traces.request import TraceRequest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MS = 1_000_000
TIE = 1e-4
WIDE = ServingConfig(num_blocks=100, block_size=16, max_seqs=8, max_batched_tokens=256, max_model_len=128)
SCARCE = dataclasses.replace(WIDE, num_blocks=13, max_seqs=6, max_batched_tokens=130)


def workload(count: int = 24, output: int = 50, hidden_stops: bool = False) -> list[TraceRequest]:
    """Prompts of 3 to 60 random tokens, all within a few milliseconds, so that they meet in steps."""
    generator = random.Random(3)
    requests = []
    for number in range(count):
        prompt = [generator.randrange(3, 101) for _ in range(generator.randint(3, 60))]
        made = generator.randint(2, output)
        requests.append(TraceRequest(number, number * MS // 2, len(prompt), made, made + 15 * hidden_stops, prompt))
    return requests


def serve(executor: Executor, requests, config: ServingConfig, stop_rule: str = "trace"):
    recorder = Recorder()
    running = executor.serve(requests, config, recorder, stop_rule)
    return RunRecords({}, recorder.tables()), running.outputs


def save(kind: dict[str, object], folder: Path) -> LlamaForCausalLM:
    model = tiny_model(seed=len(kind), **kind)
    model.save_pretrained(folder)
    return model.cuda()


@torch.no_grad()
def choices(oracle: LlamaForCausalLM, prompt: list[int], output: list[int]) -> list[int]:
    """What transformers chooses after the prompt and each beginning of the output, up to the first tie."""
    logits = oracle(torch.tensor([prompt + output[:-1]]).cuda(), logits_to_keep=len(output)).logits[0]
    best = logits.topk(2)
    ties = (best.values[:, 0] - best.values[:, 1] <= TIE).nonzero().flatten().tolist()
    return best.indices[: min([*ties, len(output)]), 0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(kind, tmp_path):
    oracle = save(KINDS[kind], tmp_path)
    requests = workload(12)
    config = dataclasses.replace(SCARCE, pipeline_depth=2)
    _, outputs = serve(Executor(str(tmp_path), "float32", device="cuda"), requests, config)
    compared = tokens = 0
    for request in requests:
        output = outputs[request.id]
        assert len(output) == request.output_len
        chosen = choices(oracle, list(request.prompt_token_ids), output)
        assert output[: len(chosen)] == chosen
        compared, tokens = compared + len(chosen), tokens + len(output)
    print(f"{kind}: {compared} of {tokens} tokens compared, the others after a tie")
    assert compared > 0.8 * tokens


@torch.no_grad()
def last_logits(model: LlamaForCausalLM, texts: list[list[int]]) -> torch.Tensor:
    return torch.cat([model(torch.tensor([text]).cuda()).logits[0, -1:].float() for text in texts])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["GQA of 3, odd hidden", "GQA of 4, head_dim 80", "MQA of 6", "llama3 RoPE"])
def test_half_precision_is_as_near_to_float32_as_transformers_is(kind, dtype, tmp_path):
    oracle = save(KINDS[kind], tmp_path)
    executor = Executor(str(tmp_path), dtype, device="cuda")
    texts = [request.prompt_token_ids for request in workload(12)]
    blocks = [[4 * i + j for j in range(4)] for i in range(len(texts))]
    cache = KVCache.allocate(executor.model, 4 * len(texts), 16, executor.llama.dtype, "cuda")
    batch = executor.llama.batch([(text, 0, owned) for text, owned in zip(texts, blocks, strict=True)], 0, cache)
    ours = executor.llama.logits(batch, cache)
    exact = last_logits(oracle, texts)
    theirs = last_logits(oracle.to(getattr(torch, dtype)), texts)
    assert 0 < (ours.float() - exact).norm() <= 1.5 * (theirs - exact).norm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def executor(folder) -> Executor:
    return Executor(str(folder), "float32", device="cuda")


@pytest.fixture(scope="module")
def expected(executor) -> dict[int, list[int]]:
    """Every request served alone, whole prompt at once, with room for all."""
    return serve(executor, workload(), dataclasses.replace(WIDE, max_seqs=1, scheduler="fcfs"))[1]


def test_the_tokens_are_those_of_the_cpu(folder, expected):
    assert serve(Executor(str(folder), device="cpu", threads=1), workload(), WIDE)[1] == expected


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("cpu_blocks", [0, 40])
def test_batched_chunked_preempted_and_swapped_requests_get_the_tokens_they_get_alone(
    executor, expected, policy, depth, cpu_blocks
):
    config = dataclasses.replace(SCARCE, scheduler=policy, pipeline_depth=depth, num_cpu_blocks=cpu_blocks)
    run, outputs = serve(executor, workload(), config)
    assert sum(run.tables["requests"]["preemptions"].to_pylist()) > 0
    assert (sum(run.tables["steps"]["swapped_out_blocks"].to_pylist()) > 0) == (cpu_blocks > 0)
    assert outputs == expected


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("hidden_stops", [False, True], ids=["length", "stops"])
@pytest.mark.parametrize("cpu_blocks", [0, 40])
def test_the_simulator_makes_the_decisions_of_a_real_run(executor, policy, depth, hidden_stops, cpu_blocks):
    config = dataclasses.replace(SCARCE, scheduler=policy, pipeline_depth=depth, num_cpu_blocks=cpu_blocks)
    run, _ = serve(executor, workload(hidden_stops=hidden_stops), config)
    assert replay(run, config).records.tables["steps"]["digest"].equals(run.tables["steps"]["digest"])
    assert negative_controls(run, config) == {"arrival_moved": True, "step_longer": True}


def test_a_server_on_the_gpu_answers_with_the_tokens_of_a_run_in_process(folder, expected, tmp_path):
    for needed in ("fastapi", "httptools", "httpx", "uvicorn", "uvloop"):  # a machine lent for its GPU may lack them
        pytest.importorskip(needed)
    from served import eventually, serving

    save_number_tokenizer(folder)
    config, out = dataclasses.replace(SCARCE, pipeline_depth=2), tmp_path / "run"
    limits = ("--max-seqs", 6, "--max-batched-tokens", 130, "--max-model-len", 128, "--depth", 2)
    cache = ("--kv-blocks", config.num_blocks, "--block-size", config.block_size)
    model = ("--backend", "real", "--device", "cuda", "--dtype", "float32", "--model", folder)
    leaving = [dataclasses.replace(each, cancel_ns=15 * MS if each.id % 2 else None) for each in workload()]
    with serving(*model, *limits, *cache, "--out", out) as server:
        stayed, left = answers(server.url, workload()), answers(server.url, leaving)
        eventually(lambda: server.status()["load"]["kv_blocks_used"] == 0)
        assert server.stop() == 0
    assert stayed == expected
    assert all(
        tokens == expected[i] if leaving[i].cancel_ns is None else expected[i][: len(tokens)] == tokens
        for i, tokens in left.items()
    )
    run = read_run(out)
    assert replay(run, config_of(run.manifest)).records.tables["steps"]["digest"].equals(run.tables["steps"]["digest"])
    assert {"cancelled", "length"} == set(run.tables["requests"]["outcome"].to_pylist())


def answers(url: str, requests: list[TraceRequest]) -> dict[int, list[int]]:
    """Output tokens, as far as they came, of requests that were sent to a server."""
    from analysis.client.load_client import find_target, send_all

    target = find_target(url, None, "trace", 101, None)
    replies = asyncio.run(send_all(target, requests, lambda _: None)).replies
    assert [reply.error for reply in replies] == [None] * len(requests)
    return {i: [int(word) for word in "".join(reply.pieces).split()] for i, reply in enumerate(replies)}


def test_the_models_own_stop_token_ends_a_request(executor):
    requests = [dataclasses.replace(each, max_tokens=60, output_len=60) for each in workload()]
    config = dataclasses.replace(WIDE, pipeline_depth=2)
    run, outputs = serve(executor, requests, config, stop_rule="model")
    stopped = [row for row in run.tables["requests"].to_pylist() if row["outcome"] == "stop"]
    assert stopped, "no request met the stop token: the test needs another seed"
    for row in stopped:
        assert outputs[row["request"]].index(2) == row["output_len"] - 1
    assert replay(run, config).records.tables["steps"]["digest"].equals(run.tables["steps"]["digest"])


def test_steps_beyond_the_captured_sizes_give_the_same_tokens(executor, monkeypatch, expected):
    monkeypatch.setattr("engine.model.graph_sizes.GRAPH_TOKENS", 20)
    monkeypatch.setattr("engine.model.graph_sizes.GRAPH_PREFILLS", 2)
    config = dataclasses.replace(WIDE, pipeline_depth=2, max_model_len=127)  # other limits: graphs are captured anew
    assert serve(executor, workload(), config)[1] == expected


def test_launching_never_waits_for_the_gpu(executor, monkeypatch):
    from engine.executor.cuda.data_plane import CudaDataPlane

    config = dataclasses.replace(SCARCE, pipeline_depth=2, num_cpu_blocks=40)
    executor.prepare(config)
    launch = CudaDataPlane.launch

    def strict(plane, step):
        torch.cuda.set_sync_debug_mode("error")
        try:
            launch(plane, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(CudaDataPlane, "launch", strict)
    run, _ = serve(executor, workload(), config)
    assert len(run.tables["steps"]) > 50


def test_nothing_is_compiled_while_serving(executor, monkeypatch):
    import triton

    config = dataclasses.replace(SCARCE, num_cpu_blocks=40, pipeline_depth=2)
    executor.prepare(config)
    compiled: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **details: compiled.append(details["repr"])
    )
    serve(executor, workload(), config)
    assert compiled == []


def test_at_depth_2_step_n_plus_1_is_planned_while_step_n_runs(executor):
    steps = serve(executor, workload(), dataclasses.replace(WIDE, pipeline_depth=2))[0].tables["steps"].to_pylist()
    early = [a["completed_ns"] > b["launched_ns"] for a, b in itertools.pairwise(steps)]
    assert sum(early) > len(early) / 4
    starts, ends = ([step[name] for step in steps] for name in ("device_start_ns", "completed_ns"))
    assert all(start <= end for start, end in zip(starts, ends, strict=True))


def test_blocks_are_measured_and_a_full_run_fits(executor):
    config = dataclasses.replace(WIDE, max_batched_tokens=4096, max_seqs=64, max_model_len=4096, pipeline_depth=2)
    blocks = executor.measure_blocks(config)
    assert blocks == 64 * 4096 // 16  # a tiny model: the limits end it, not the memory
    serve(executor, workload(), dataclasses.replace(config, num_blocks=blocks))


def test_limits_that_do_not_fit_say_what_takes_the_memory(executor):
    huge = dataclasses.replace(WIDE, max_batched_tokens=1 << 27)
    with pytest.raises(TandemError, match="lower --max-batched-tokens"):
        executor.measure_blocks(huge)
    long = dataclasses.replace(WIDE, max_model_len=1 << 26)
    with pytest.raises(TandemError, match="lower --max-batched-tokens, --max-seqs or --max-model-len"):
        executor.measure_blocks(long)
    with pytest.raises(TandemError, match="lower --kv-blocks"):
        executor.prepare(dataclasses.replace(WIDE, num_blocks=1 << 26))


@pytest.fixture
def alone() -> None:
    free, total = torch.cuda.mem_get_info()
    if free < 0.97 * total:
        pytest.skip("others are on this GPU, in processes beside this one: run it alone")


def test_an_interrupted_profile_goes_on_where_it_was_and_predicts_a_run(alone, executor, tmp_path):
    config = dataclasses.replace(WIDE, num_cpu_blocks=40)
    notes = tmp_path / "notes.jsonl"

    def give_up(done: int) -> None:
        if done == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_profile(executor, config, give_up, notes)
    kept = notes.read_text().splitlines()
    assert len(kept) == 41  # and a line that says of what
    profile = measure_profile(executor, config, notes=notes)
    recorder = Recorder()
    executor.serve(calibration_load(profile, config).requests, config, recorder)
    profile = calibrate(profile, [(RunRecords({}, recorder.tables()), config)])
    assert {"graph", "in_service", "swap"} < profile.tables.keys()
    assert set(profile.meta.held_out["by_kind"]) == {"decode", "mixed"}
    assert profile.meta.notes["machine_state"]["before"]["driver"]
    recorder = Recorder()
    outside = predict(workload(), config, profile, recorder)
    assert len(recorder.tables()["requests"]) == 24 and outside["lookups"] > 100


def test_as_many_blocks_fit_as_the_memory_model_predicts(alone):
    executor = Executor("llama-3.2-1b", load_format="dummy", device="cuda")
    for tokens in (2048, 16384):
        config = ServingConfig(1, block_size=64, max_seqs=256, max_batched_tokens=tokens, max_model_len=16384)
        card_gib = torch.cuda.mem_get_info()[1] / 2**30
        predicted = Memory.of(card_gib, executor.model, executor.dtype, config).blocks
        assert predicted == pytest.approx(executor.measure_blocks(config), rel=0.02)
