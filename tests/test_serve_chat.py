"""Chats over HTTP: what the client sends reaches the chat template, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from test_one_request import ask_in_process
from tiny_tokenizers import ADDED, SPECIAL, fast, text_of, tokens_of

from analysis.bench.server_path import steady_profile
from engine.server.detokenization import Writer
from engine.server.engine_client import EngineClient
from engine.server.openai_format import Asked, CompletionFormat
from engine.server.response import Answer
from engine.server.tokenization import Text
from sim.profile.format import write_profile

KIND = "byte-level"
JSON = {"Content-Type": "application/json"}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}({{ m.name }}{{ m.tool_call_id }}):{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %};{% endfor %}"
    "{{ mood }}{% if add_generation_prompt %}assistant:{% endif %}"
)
HI = {"role": "user", "content": "Hi"}
PART = {"type": "text", "text": "Hi"}
IMAGE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}


def calling(arguments: object, **more: object) -> dict[str, object]:
    call = {"id": "a1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]} | more


WRITTEN = [  # a body, and the prompt that it makes
    ({"messages": [HI]}, "user():Hi;assistant:"),
    ({"messages": [HI | {"content": [PART, PART]}]}, "user():Hi\nHi;assistant:"),
    ({"messages": [HI | {"name": "Ann", "audio": None, "tool_calls": None}]}, "user(Ann):Hi;assistant:"),
    ({"messages": [HI], "add_generation_prompt": False}, "user():Hi;"),
    ({"messages": [HI], "chat_template_kwargs": {"mood": "merry", "unknown": 1}}, "user():Hi;merryassistant:"),
    ({"messages": [HI], "chat_template_kwargs": None, "continue_final_message": None}, "user():Hi;assistant:"),
    ({"messages": [HI, HI | {"role": "assistant"}], "continue_final_message": True}, "user():Hi;assistant():Hi"),
    ({"messages": [HI, {"role": "assistant", "content": None}, HI]}, "user():Hi;assistant():;user():Hi;assistant:"),
    ({"messages": [HI, calling('{"q": "é"}', content=None)]}, 'user():Hi;assistant():f{"q": "é"};assistant:'),
    ({"messages": [HI, calling({"q": 1})]}, 'user():Hi;assistant():f{"q": 1};assistant:'),
    ({"messages": [HI, calling("")]}, "user():Hi;assistant():f{};assistant:"),
    ({"messages": [HI, calling("null")]}, "user():Hi;assistant():f{};assistant:"),
    (
        {"messages": [HI, calling("{}"), {"role": "tool", "content": "4", "tool_call_id": "a1"}]},
        "user():Hi;assistant():f{};tool(a1):4;assistant:",
    ),
    ({"messages": [HI], "add_special_tokens": True}, "<s>user():Hi;assistant:"),
]
REFUSED = [  # a body, and what its error names
    ({"messages": [HI | {"content": None}]}, "content is null"),
    ({"messages": [{"role": "user"}]}, "content is null or missing"),
    ({"messages": [HI | {"content": [PART, IMAGE]}]}, "part 1 is 'image_url'"),
    ({"messages": [HI, {"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]}, "function_call"),
    ({"messages": [HI, {"role": "assistant", "content": None, "refusal": "No."}]}, "refusal is not supported"),
    ({"messages": [HI, calling("{")]}, "messages[1].tool_calls[0].function.arguments"),
    ({"messages": [HI, calling('["q"]')]}, "give a JSON object"),
    ({"messages": [HI], "continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
    ({"messages": [HI], "chat_template_kwargs": {"tokenize": True}}, "tokenize"),
    ({"messages": [HI], "chat_template_kwargs": {"chat_template": "x"}}, "chat_template"),
    ({"messages": [HI], "chat_template_kwargs": {"add_generation_prompt": False}}, "add_generation_prompt"),
    ({"messages": [HI], "chat_template": "{{ 1 }}"}, "chat_template is not supported"),
    ({"messages": [HI], "documents": [{"text": "x"}]}, "documents is not supported"),
    ({"messages": [HI], "skip_special_tokens": False}, "skip_special_tokens is not supported"),
    ({"messages": [HI], "include_stop_str_in_output": True}, "include_stop_str_in_output is not supported"),
    ({"messages": [HI], "chat_template_kwargs": {"mood": "\ud800"}}, "half a surrogate pair"),
    ({"messages": [HI, calling('{"q": "\\ud800"}'), HI]}, "cannot read the prompt"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    write_profile(steady_profile(2000), folder / "profile")
    return folder


def test_what_a_client_sends_reaches_the_template_or_is_refused_by_name(folder):
    text = Text(fast(tokens_of(KIND), chat_template=TEMPLATE))

    async def ask(client: httpx.AsyncClient, engine: EngineClient) -> None:
        async def post(body: dict[str, object]) -> httpx.Response:
            content = json.dumps(body | {"max_tokens": 2})
            return await client.post("/v1/chat/completions", content=content, headers=JSON)

        for body, prompt in WRITTEN:
            answer = await post(body)
            assert answer.status_code == 200, answer.text
            expected = text.encode(prompt, add_special_tokens=False)
            assert answer.json()["usage"]["prompt_tokens"] == len(expected), (body, prompt)
        for body, why in REFUSED:
            answer = await post(body)
            assert (answer.status_code, why in answer.json()["error"]["message"]) == (400, True), answer.text

    ask_in_process(folder, text, ask, text.vocab_size)


@pytest.mark.parametrize("stop", ["<s>", ADDED], ids=["special", "not special"])
def test_a_stop_tokens_own_text_is_not_in_the_answer_unless_it_stops_nothing(stop):
    tokens = tokens_of(KIND)
    fox, end = tokens.encode("fox", add_special_tokens=False).ids, tokens.token_to_id(stop)
    for stop_tokens, text in (((end,), "fox"), ((), tokens.decode([*fox, end]))):
        writer = Writer(text_of(KIND).detokenizer, tokens.encode("the").ids)
        (output,) = Answer(None, CompletionFormat(1, 0, "m", Asked([1])), False, [writer], stop_tokens).outputs
        for token in (*fox, end):
            output.take(token, last=token == end)
        output.end("stop", None)
        assert output.choice(CompletionFormat(1, 0, "m", Asked([1])))["text"] == text
    assert SPECIAL[0] not in text
