"""`tandem serve` in front of the executor: the model's own words, over the same API."""

from __future__ import annotations

import openai
import pytest
from served import serving

from engine.config import ServingConfig
from engine.executor.executor import Executor
from engine.executor.tokenizer import load_tokenizer, smollm2_path
from engine.records.manifest import config_of
from engine.records.recorder import Recorder
from engine.records.run_folder import read_run
from sim.replay import replay
from traces.request import TraceRequest
from traces.trace import read_trace

LIMITS = ("--max-seqs", 4, "--max-batched-tokens", 128, "--max-model-len", 256, "--depth", 2)
PROMPT, TOKENS = "The capital of France is", 12


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What a real server answered, and its run."""
    out = tmp_path_factory.mktemp("real") / "run"
    with serving("--backend", "real", "--device", "cpu", *LIMITS, "--out", out) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        (model,) = client.models.list().data
        asked = {"model": model.id, "max_tokens": TOKENS}
        chat = [{"role": "user", "content": "Say hello."}]
        got = {
            "whole": client.completions.create(prompt=PROMPT, **asked),
            "stream": list(client.completions.create(prompt=PROMPT, stream=True, **asked)),
            "chat": client.chat.completions.create(model=model.id, messages=chat, max_tokens=60),
            "on": client.chat.completions.create(
                model=model.id, messages=chat, max_tokens=60, extra_body={"ignore_eos": True}
            ),
            "later": client.chat.completions.create(
                model=model.id, messages=chat, max_tokens=60, extra_body={"min_tokens": 40}
            ),
        }
        assert server.status()["load"]["kv_blocks_used"] == 0
        assert server.stop() == 0
    return got, out


def test_served_text_is_what_the_executor_makes_of_the_prompt(answers):
    tokenizer = load_tokenizer(smollm2_path())
    ids = tokenizer.encode(PROMPT)
    config = ServingConfig(num_blocks=40, max_seqs=4, max_batched_tokens=128, max_model_len=256)
    request = TraceRequest(0, 0, len(ids), TOKENS, TOKENS, ids)
    outputs = Executor("smollm2", device="cpu").serve([request], config, Recorder()).outputs
    got, _ = answers
    assert got["whole"].choices[0].text == tokenizer.decode(outputs[0])
    assert "".join(chunk.choices[0].text for chunk in got["stream"]) == got["whole"].choices[0].text
    assert "Paris" in got["whole"].choices[0].text


def test_a_chat_ends_where_the_model_says_so_unless_told_otherwise(answers):
    got, _ = answers
    chat, on, later = got["chat"], got["on"], got["later"]
    assert chat.choices[0].finish_reason == "stop" and chat.usage.completion_tokens < 40
    assert "<|im_end|>" not in chat.choices[0].message.content
    assert (on.choices[0].finish_reason, on.usage.completion_tokens) == ("length", 60)
    assert later.usage.completion_tokens >= 40
    assert on.choices[0].message.content.startswith(chat.choices[0].message.content)


def test_its_records_replay_and_its_workload_is_a_trace(answers):
    _, out = answers
    run, trace = read_run(out), read_trace(out / "trace.parquet")
    assert run.manifest["workload"]["trace"] == trace.digest
    assert trace.requests[0].prompt_token_ids is not None
    assert replay(run, config_of(run.manifest)).records.tables["steps"]["digest"].equals(run.tables["steps"]["digest"])
