"""One request cannot end the engine: what is wrong with it is said in its own answer, and everyone else is served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
import uvloop
from served import Server, serving
from test_live import assert_replay_is_the_same
from tiny_models import save_number_tokenizer, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from analysis.bench.server_path import steady_profile
from analysis.jobs.options import Limits
from analysis.jobs.serve import SimService
from engine.records.manifest import config_of
from engine.records.run_folder import read_run
from engine.server.app import ServerLimits, build_app
from engine.server.detokenization import Detokenizer, Writer
from engine.server.engine_client import EngineClient
from engine.server.tokenization import Text
from engine.stop_condition import StopCondition
from sim.profile.format import write_profile
from traces.request import TraceRequest
from traces.trace import read_trace

MODELS_TOKENS, TOKENIZERS_TOKENS = 101, 150  # as where tokens were added to a tokenizer, and no rows to the embedding
LIMITS = ("--max-seqs", 8, "--max-batched-tokens", 256, "--max-model-len", 200, "--block-size", 8, "--kv-blocks", 100)
FOLLOWED = " ".join(str(token) for token in range(3, 43))  # 40 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that lacks some of its tokenizer's tokens, and a profile."""
    folder = tmp_path_factory.mktemp("small")
    tiny_model().save_pretrained(folder / "model")
    save_number_tokenizer(folder / "model", TOKENIZERS_TOKENS)
    write_profile(steady_profile(2000), folder / "profile")
    return folder


def options(backend: str, folder: Path) -> tuple[object, ...]:
    model = ("--model", folder / "model", *LIMITS, "--depth", 2, "--prefix-caching", "--out", folder / f"{backend}-run")
    if backend == "sim":
        return "--backend", "sim", "--profile", folder / "profile", *model
    return "--backend", "real", "--device", "cpu", "--threads", 1, *model


@pytest.fixture(scope="module", params=["sim", "real"])
def served(request, folder) -> Iterator[tuple[str, Server, Path]]:
    """A server on either backend, and where its records will be; they are looked at by the last test."""
    with serving(*options(request.param, folder)) as server:
        yield request.param, server, folder / f"{request.param}-run"


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def model_of(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


BAD = {
    "token ids of which one is in no vocabulary": {"prompt": [5, 6, TOKENIZERS_TOKENS]},
    "the largest token id": {"prompt": [2**31 - 1]},
    "a negative token id": {"prompt": [5, -1]},
    "no text": {"prompt": ""},
    "text without a token": {"prompt": "   "},
    "no token ids": {"prompt": []},
    "no output": {"max_tokens": 0},
    "more output than fits": {"max_tokens": 10**9},
    "a prompt that is too long": {"prompt": "7 " * 300},
    "a prompt that fits, and leaves no room": {"prompt": "7 " * 199, "max_tokens": 2},
    "a good prompt and a bad one": {"prompt": [[5, 6], [TOKENIZERS_TOKENS]]},
    "stop tokens": {"stop_token_ids": [10**6]},
    "an empty stop string": {"stop": ""},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("fields", BAD.values(), ids=list(BAD))
def test_a_request_that_cannot_be_served_gets_a_400_in_openais_format(served, fields, stream):
    _, server, _ = served
    answer = server.complete(**({"prompt": "5 6 7", "max_tokens": 5, "stream": stream} | fields))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (400, 400, "BadRequestError")
    assert error["message"]
    assert server.get("/health").status_code == 200


def test_text_with_a_token_that_the_model_lacks_is_refused_beside_others_whose_tokens_do_not_change(served):
    backend, server, _ = served
    client = client_of(server)
    asked = {"model": model_of(client), "prompt": FOLLOWED, "max_tokens": 100, "extra_body": {"ignore_eos": True}}
    alone = client.completions.create(**asked).choices[0]
    beside = client.completions.create(**asked, stream=True)
    next(iter(beside))
    if backend == "real":
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=r"token id 120 is not in the model's vocabulary.* '120'"):
                client.completions.create(model=asked["model"], prompt="5 120 6", stream=stream)
    else:  # a simulation takes what its tokenizer makes, whatever model it stands for
        assert client.completions.create(model=asked["model"], prompt="5 120 6", max_tokens=3).usage.prompt_tokens == 3
    rest = list(beside)
    assert len(rest) == 99 and alone.text.endswith("".join(chunk.choices[0].text for chunk in rest))
    assert client.completions.create(**asked).choices[0].text == alone.text


def test_a_stop_string_that_never_comes_changes_nothing(served):
    _, server, _ = served
    asked = {"prompt": "5 6 7", "max_tokens": 9}
    plain, waiting = (server.complete(**asked, stop=stop).json() for stop in (None, ["zebra", "x"]))
    assert plain["choices"] == waiting["choices"] and plain["usage"] == waiting["usage"]


def test_one_that_stops_a_token_before_max_tokens_says_stop(served):
    _, server, _ = served
    done = server.complete(prompt="5 6 7", max_tokens=10, output_len=9, ignore_eos=True).json()
    assert (done["usage"]["completion_tokens"], done["choices"][0]["finish_reason"]) == (9, "stop")


def test_all_of_it_is_in_the_records_which_replay(served):
    backend, server, out = served
    assert server.stop() == 0
    run = read_run(out)
    rows = run.tables["requests"].to_pylist()
    refused = [row for row in rows if row["refused"]]
    assert bool(refused) == (backend == "real")
    assert all(row["outcome"] == "rejected" and "vocabulary" in row["reason"] for row in refused)
    last = rows[-1]
    assert (last["outcome"], last["output_len"], last["wasted_tokens"]) == ("stop", 9, 1)
    assert sum(row["cached_tokens"] for row in rows) >= 64, "prompts that began alike shared blocks"
    assert_replay_is_the_same(run, config_of(run.manifest))
    requests = read_trace(out / "trace.parquet").requests
    assert [len(each.prompt_token_ids) for each in requests] == [each.prompt_len for each in requests]


# -- faults on this side of the engine ---------------------------------------------------------------------


def text_of(template: str | None = None) -> Text:
    """A tokenizer of the words 0 to 4 that has nothing for any other."""
    tokenizer = Tokenizer(models.WordLevel({str(token): token for token in range(5)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Text(PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template))


Ask = Callable[[httpx.AsyncClient, EngineClient], Awaitable[None]]


def ask_in_process(folder: Path, text: Text, ask: Ask, vocab_size: int = 5) -> None:
    """Have an API in this process answered by a simulated engine in another."""

    async def main() -> None:
        limits = Limits(num_blocks=100, block_size=8, max_seqs=8, max_batched_tokens=256, max_model_len=200)
        engine = EngineClient(SimService(folder / "profile", limits, [1, 2, 3], vocab_size))
        try:
            await engine.start()
            transport = httpx.ASGITransport(build_app(engine, text, ServerLimits("m")), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                await ask(client, engine)
            await engine.close()
        finally:
            engine.kill()

    uvloop.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("words", ["2 two", "2 two " * 1000], ids=["short", "long enough for a thread"])
def test_text_that_the_tokenizer_cannot_read_gets_a_400(folder, words):
    async def ask(client: httpx.AsyncClient, engine: EngineClient) -> None:
        answer = await client.post("/v1/completions", json={"prompt": words})
        cannot_fit = len(words) > 200
        assert answer.status_code == 400
        assert ("cannot fit" if cannot_fit else "the tokenizer cannot read") in answer.json()["error"]["message"]
        assert (await client.post("/v1/completions", json={"prompt": "2"})).status_code == 200

    ask_in_process(folder, text_of(), ask)


def test_a_conversation_on_which_the_chat_template_fails_as_programs_do_gets_a_400(folder):
    async def ask(client: httpx.AsyncClient, engine: EngineClient) -> None:
        body = {"messages": [{"role": "user", "content": "1"}]}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert "the chat template refuses" in answer.json()["error"]["message"]

    ask_in_process(folder, text_of("{{ messages[0]['content'] + 1 }}"), ask)


class Clumsy(Writer):
    """Fails on the answers to whoever asks for it."""

    __slots__ = ("_fails",)

    def __init__(self, detokenizer: Detokenizer, prompt: list[int], stops: list[str], min_tokens: int) -> None:
        super().__init__(detokenizer, prompt, stops, min_tokens)
        self._fails = stops

    def take(self, token: int) -> str:
        if "take" in self._fails:
            raise KeyError(token)
        return super().take(token)

    def rest(self) -> str:
        if "rest" in self._fails:
            raise KeyError("rest")
        return super().rest()


@pytest.mark.parametrize("moment", ["take", "rest"])
def test_an_answer_that_cannot_be_written_is_a_500_and_the_others_get_theirs(folder, monkeypatch, capfd, moment):
    monkeypatch.setattr("engine.server.app.Writer", Clumsy)

    async def ask(client: httpx.AsyncClient, engine: EngineClient) -> None:
        body = {"prompt": "2", "max_tokens": 20}
        bodies = [body, body | {"stop": moment}, body | {"stop": moment, "stream": True}, body]
        answers = await asyncio.gather(*(client.post("/v1/completions", json=each) for each in bodies))
        assert [answer.json()["usage"]["completion_tokens"] for answer in (answers[0], answers[3])] == [20, 20]
        assert answers[1].status_code == 500
        assert "cannot be written: KeyError" in answers[1].json()["error"]["message"]
        assert "cannot be written: KeyError" in answers[2].text and "[DONE]" not in answers[2].text
        assert engine.open_requests == engine.without_token == 0

    ask_in_process(folder, text_of(), ask)
    assert "KeyError" in capfd.readouterr().err, "it is not hidden from who runs the server"


def test_a_fault_of_the_server_is_a_500_in_openais_format(folder, monkeypatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by nothing")

    async def ask(client: httpx.AsyncClient, engine: EngineClient) -> None:
        with monkeypatch.context() as broken:
            broken.setattr("engine.server.app._Api._limit", fail)
            answer = await client.post("/v1/completions", json={"prompt": "2"})
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "InternalServerError"
        assert "ZeroDivisionError" in answer.json()["error"]["message"]
        assert (await client.post("/v1/completions", json={"prompt": "2"})).status_code == 200

    ask_in_process(folder, text_of(), ask)


class KeptTokens:
    """A token sink that keeps its tokens, or fails at each."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.tokens: list[int] = []
        self.ended: asyncio.Future[tuple[str, str | None]] = asyncio.get_running_loop().create_future()

    def take(self, token: int, last: bool) -> None:
        if self.fails:
            raise RuntimeError("clumsy")
        self.tokens.append(token)

    def end(self, outcome: str, reason: str | None) -> None:
        self.ended.set_result((outcome, reason))


def test_a_burst_of_more_requests_than_the_pipe_holds_is_served(folder):
    async def ask(client: httpx.AsyncClient, engine: EngineClient) -> None:
        sinks = [KeptTokens() for _ in range(2000)]
        for sink in sinks:
            engine.submit(sink, TraceRequest(0, 0, 60, 1, 1, [1] * 60), 0, StopCondition())
        assert {await sink.ended for sink in sinks} == {("length", None)}

    ask_in_process(folder, text_of(), ask)


def test_a_sink_that_fails_loses_its_own_tokens_alone(folder):
    async def ask(client: httpx.AsyncClient, engine: EngineClient) -> None:
        sinks = [KeptTokens(), KeptTokens(fails=True), KeptTokens()]
        for sink in sinks:
            engine.submit(sink, TraceRequest(0, 0, 2, 12, 12, [1, 2]), 0, StopCondition())
        ends = [await sink.ended for sink in sinks]
        assert [outcome for outcome, _ in ends] == ["length", "broken", "length"]
        assert sinks[0].tokens == sinks[2].tokens == [1, 2, 3] * 4

    ask_in_process(folder, text_of(), ask)
