"""`tandem serve`, met as its clients meet it: the official `openai` client, and raw HTTP."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import MODEL, PROFILE, Server, eventually, serving, sim

from engine.executor.tokenizer import load_tokenizer, smollm2_path
from engine.records.manifest import config_of
from engine.records.recorder import Recorder
from engine.records.run_folder import read_run
from sim.device_timing import DeliveredTiming
from sim.profile.format import find_profile, read_profile
from sim.replay import deliveries, recorded_requests, replay
from sim.simulate import simulate

FOX = " The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def server() -> Server:
    with serving(*sim()) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


# -- what it says ------------------------------------------------------------------------------------------


def test_a_completion_has_as_many_tokens_as_were_asked_for(client):
    done = client.completions.create(model=MODEL, prompt="Hello there", max_tokens=12)
    assert done.choices[0].text == FOX + " The quick" and done.choices[0].finish_reason == "length"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (2, 12, 14)


def test_a_streamed_completion_is_a_chunk_a_token_and_the_same_text(client):
    stream = client.completions.create(
        model=MODEL, prompt=[1, 2, 3], max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert [len(chunk.choices) for chunk in chunks] == [1] * 12 and last.choices == []
    assert "".join(chunk.choices[0].text for chunk in chunks) == FOX + " The quick"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 11 + ["length"]
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 12)


def test_a_chat_streams_and_does_not(client):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=10)
    assert (whole.choices[0].message.role, whole.choices[0].message.content) == ("assistant", FOX)
    stream = list(client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=10, stream=True))
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in stream) == FOX
    assert whole.usage.prompt_tokens > 10, "the chat template was applied"


def test_several_prompts_are_answered_by_a_choice_each_streamed_or_not(client):
    whole = client.completions.create(model=MODEL, prompt=["a", "b c"], max_tokens=3)
    assert [(choice.index, choice.text) for choice in whole.choices] == [(0, FOX[:16]), (1, FOX[:16])]
    texts = ["", ""]
    for chunk in client.completions.create(model=MODEL, prompt=["a", "b c"], max_tokens=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [FOX[:16]] * 2


def test_an_echo_is_the_prompt_before_the_answer_streamed_or_not(client):
    tokenizer = load_tokenizer(smollm2_path())
    for prompt, text in (("Hello there", "Hello there"), ([2683, 253, 655], tokenizer.decode([2683, 253, 655]))):
        whole = client.completions.create(model=MODEL, prompt=prompt, max_tokens=3, echo=True)
        assert whole.choices[0].text == text + FOX[:16] and whole.usage.completion_tokens == 3
        stream = client.completions.create(model=MODEL, prompt=prompt, max_tokens=3, echo=True, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == text + FOX[:16]


def test_continuous_usage_counts_each_output_so_far(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.completions.create(
        model=MODEL, prompt=[[1], [2, 3]], max_tokens=3, stream=True, stream_options=options
    )
    *chunks, last = list(stream)
    counts = [(each.choices[0].index, each.usage.prompt_tokens, each.usage.completion_tokens) for each in chunks]
    assert sorted(counts) == [(index, index + 1, made) for index in (0, 1) for made in (1, 2, 3)]
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (3, 6, 9)


def test_async_clients_are_served_at_once(server):
    async def main() -> float:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none")
        async with client:
            begin = time.perf_counter()
            answers = [client.completions.create(model=MODEL, prompt="x", max_tokens=40) for _ in range(20)]
            assert {answer.usage.completion_tokens for answer in await asyncio.gather(*answers)} == {40}
            return time.perf_counter() - begin

    assert asyncio.run(main()) < 5, "one after the other they would take ten seconds"


def test_output_ends_before_a_stop_string_and_the_engine_is_told(client, server):
    done = client.completions.create(model=MODEL, prompt="x", max_tokens=1000, stop=["fox jumps", "zebra"])
    assert (done.choices[0].text, done.choices[0].finish_reason) == (" The quick brown ", "stop")
    eventually(lambda: server.status()["load"]["kv_blocks_used"] == 0, 2)


def test_output_len_stops_a_request_where_the_scheduler_did_not_expect_it(server):
    done = server.complete(max_tokens=100, output_len=7).json()
    assert (done["usage"]["completion_tokens"], done["choices"][0]["finish_reason"]) == (7, "stop")


def test_models_health_and_version(client, server):
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert server.get("/health").json() == {"status": "ok"} and server.get("/version").json()["version"]


def test_metrics_have_vllms_names_and_buckets_that_tell_5_ms_from_6(server):
    before = scrape(server)
    server.complete(max_tokens=11)
    after = scrape(server)
    grew = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grew["vllm:generation_tokens_total"] == 11 and grew["vllm:request_success_total", "length"] == 1
    assert grew["vllm:time_to_first_token_seconds_count"] == grew["vllm:e2e_request_latency_seconds_count"] == 1
    assert grew["vllm:inter_token_latency_seconds_count"] == 10
    assert 0.08 < grew["vllm:inter_token_latency_seconds_sum"] < 1
    assert ("vllm:inter_token_latency_seconds_bucket", "0.005") in after
    assert ("vllm:inter_token_latency_seconds_bucket", "0.006") in after
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[f"vllm:{gauge}"] == 0


def scrape(server: Server) -> dict:
    samples = [
        sample for family in text_string_to_metric_families(server.get("/metrics").text) for sample in family.samples
    ]
    return {
        (sample.name, *others)
        if (others := [v for k, v in sample.labels.items() if k != "model_name"])
        else sample.name: sample.value
        for sample in samples
    }


# -- what it refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"temperature": 0.7}, 400, "decoding here is greedy"),
        ({"repetition_penalty": 1.2}, 400, "repetition_penalty would change the output"),
        ({"n": 2}, 400, "n is not supported"),
        ({"some_field_of_another_server": 1}, 400, "'some_field_of_another_server': no such field"),
        ({"logprobs": 5}, 400, "logprobs is not supported"),
        ({"model": "gpt-5"}, 404, "no model 'gpt-5' here"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": 10**30}, 400, "max_tokens"),
        ({"max_tokens": "7"}, 400, "max_tokens"),
        ({"max_tokens": 9000}, 400, "the longest here"),
        ({"min_tokens": 20, "max_tokens": 10}, 400, "min_tokens is 20"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": [10**6]}, 400, "vocabulary"),
        ({"prompt": {"a": 1}}, 400, "prompt"),
        ({"prompt": "x" * 10_000_000}, 400, "cannot fit"),
        ({"prompt": ["x"] * 1000}, 400, "at most 64"),
        ({"priority": 2**63}, 400, "priority"),
        ({"stop": [""]}, 400, "stop"),
    ],
)
def test_a_bad_request_gets_the_right_status_and_a_reason(server, fields, status, says):
    answer = server.complete(**fields)
    assert answer.status_code == status and says in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "top_p": 0.9, "seed": 3},
        {"temperature": 0.0, "repetition_penalty": 1.0, "logprobs": None, "ignore_eos": True},  # vllm bench serve
        {"frequency_penalty": 0, "best_of": 1, "metadata": {"a": [1]}, "user": None},
    ],
)
def test_parameters_that_leave_greedy_output_as_it_is_are_taken(server, fields):
    assert server.complete(max_tokens=2, **fields).status_code == 200


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff\xfe", b"", b"null", b"[1]", b'"x"', b"[" * 100_000, b'{"prompt": "\\ud800"}', b'{"prompt": NaN}'],
)
def test_a_body_that_is_no_request_gets_a_400(server, content):
    answer = server.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_body_beyond_the_limit_gets_a_413_whether_or_not_it_says_how_long_it_is(server):
    body = b'{"prompt": "' + b"x" * 17 * 2**20
    assert server.post("/v1/completions", content=body).status_code == 413
    chunks = iter([body[at : at + 2**20] for at in range(0, len(body), 2**20)])
    assert server.post("/v1/completions", content=chunks).status_code == 413


def test_an_api_key_is_asked_for_on_v1_alone():
    with serving(*sim(), env={"TANDEM_API_KEY": "s3cret"}) as server:
        assert server.complete().status_code == 401
        for given in ("Bearer s3cre", "Basic s3cret", "s3cret", "Bearer"):
            assert server.get("/v1/models", headers={"Authorization": given}).status_code == 401
        for scheme in ("Bearer", "bearer", "BEARER"):
            assert server.get("/v1/models", headers={"Authorization": f"{scheme} s3cret"}).status_code == 200
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret")
        assert client.completions.create(model=MODEL, prompt="x", max_tokens=2).usage.completion_tokens == 2
        assert server.get("/health").status_code == 200
        assert server.status()["model"] == MODEL


def test_it_listens_on_loopback_alone(server):
    assert server.url.startswith("http://127.0.0.1:")


# -- when things end ---------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_blocks_within_two_steps_and_the_records_equal_an_offline_simulation(tmp_path):
    with serving(*sim(), "--out", tmp_path / "run") as server:
        stayed = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").completions.create(
            model=MODEL, prompt="I stay", max_tokens=150, stream=True
        )
        next(iter(stayed))
        leaving = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").completions.create(
            model=MODEL,
            prompt=list(range(1000)),
            max_tokens=1000,
            stream=True,
            extra_body={"priority": 3, "user": "ada"},
        )
        for _ in range(20):
            next(iter(leaving))
        left_ns = time.perf_counter_ns()
        leaving.response.close()
        server.complete(max_tokens=5, stop=["quick"])
        assert sum(1 for _ in stayed) == 149
        assert server.stop() == 0
    run = read_run(tmp_path / "run")
    _, gone, stopped = run.tables["requests"].to_pylist()
    assert (gone["outcome"], gone["reason"], gone["priority"], gone["client"]) == (
        "cancelled",
        "the client is gone",
        3,
        "ada",
    )
    assert (stopped["outcome"], stopped["reason"]) == ("cancelled", "stop")
    left_ns -= run.manifest["provenance"]["start_perf_ns"]
    assert 0 <= gone["cancel_ns"] - left_ns < 200e6
    steps = run.tables["steps"].to_pylist()
    before = [row["kv_blocks_used"] for row in steps if row["scheduled_ns"] <= gone["cancel_ns"]]
    after = [row["kv_blocks_used"] for row in steps if row["scheduled_ns"] > gone["cancel_ns"]]
    assert before[-1] > 60 and max(after[2:]) < 20
    assert_equal_offline(tmp_path / "run")


def assert_equal_offline(folder: Path) -> None:
    """A simulation that is given the times at which the server's loop took its events writes the same records."""
    run = read_run(folder)
    config, requests, offline = config_of(run.manifest), recorded_requests(run), Recorder()
    timing = DeliveredTiming(read_profile(find_profile(Path(PROFILE))))
    simulate(requests, config, timing, offline, events=deliveries(run, requests))
    tables = offline.tables()
    assert all(tables[name].equals(run.tables[name]) for name in tables)
    assert replay(run, config).records.tables["steps"]["digest"].equals(run.tables["steps"]["digest"])


def test_under_a_burst_of_cancelled_and_preempted_requests_real_time_equals_offline(tmp_path):
    limits = (
        "--kv-blocks",
        60,
        "--max-seqs",
        16,
        "--max-batched-tokens",
        64,
        "--depth",
        2,
        "--output-len",
        "uniform:1:200",
    )
    with serving(*sim(), *limits, "--out", tmp_path / "run") as server:

        async def one(client: openai.AsyncOpenAI, number: int) -> None:
            await asyncio.sleep(number * 0.004)
            prompt = list(range(1, 5 + 7 * number % 90))
            stream = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=150, stream=True)
            seen = 0
            async for _ in stream:
                seen += 1
                if number % 3 == 0 and seen == 5:
                    await stream.response.aclose()
                    return

        async def main() -> None:
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
                await asyncio.gather(*(one(client, number) for number in range(60)))

        asyncio.run(main())
        assert server.stop() == 0
    summary = read_run(tmp_path / "run").summary
    assert summary["preemptions"] > 0 and summary["cancelled"] >= 15
    assert_equal_offline(tmp_path / "run")


def test_beyond_the_bounded_queue_requests_get_a_429_and_when_to_come_back(server):
    with serving(*sim(), "--max-seqs", 1, "--max-waiting", 2) as small:

        async def main() -> list[int]:
            async with openai.AsyncOpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0) as client:
                running = await client.completions.create(model=MODEL, prompt="x", max_tokens=300, stream=True)
                await anext(running)
                queued = [
                    asyncio.create_task(client.completions.create(model=MODEL, prompt="x", max_tokens=1))
                    for _ in range(2)
                ]
                await asyncio.sleep(0.3)
                with pytest.raises(openai.RateLimitError) as refused:
                    await client.completions.create(model=MODEL, prompt="x", max_tokens=1)
                assert int(refused.value.response.headers["retry-after"]) >= 1
                await running.close()
                return [(await one).usage.completion_tokens for one in queued]

        assert asyncio.run(main()) == [1, 1]


def test_told_to_stop_it_finishes_what_runs_within_the_drain_time_and_fails_the_rest_aloud(tmp_path):
    with serving(*sim(), "--drain", 2, "--out", tmp_path / "run") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        short = client.completions.create(model=MODEL, prompt="x", max_tokens=80, stream=True)
        long = client.completions.create(model=MODEL, prompt="x", max_tokens=2000, stream=True)
        next(iter(short)), next(iter(long))
        server.process.send_signal(15)
        assert sum(1 for _ in short) == 79
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(long)
        assert server.process.wait(20) == 0
    assert [row["outcome"] for row in read_run(tmp_path / "run").tables["requests"].to_pylist()] == [
        "length",
        "cancelled",
    ]


def test_a_dead_engine_turns_health_red_and_answers_who_waits(tmp_path):
    with serving(*sim()) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model=MODEL, prompt="x", max_tokens=2000, stream=True)
        next(iter(stream))
        os.kill(server.engine_pid, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="the engine's process died"):
            list(stream)
        assert server.get("/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="the engine's process died"):
            client.completions.create(model=MODEL, prompt="x")
        assert server.stop() == 2 and "the engine ended early" in server.log[-1]
