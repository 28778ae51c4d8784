"""The fields of a request: each is served, of no effect, or refused by name, and the documents say which."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
from openai.types import completion_create_params as openai_completions
from openai.types.chat import completion_create_params as openai_chat
from pydantic import BaseModel, ValidationError

from engine.server.descriptors import RESERVED
from engine.server.json_body import MOST_FIELDS, MOST_VALUES, read_json
from engine.server.limited_protocol import BODY_S, HEAD_S, MAX_HEADER_BYTES
from engine.server.protocol import MOST_MESSAGES, MOST_PARTS, ChatRequest, CompletionRequest, StreamOptions
from engine.server.refused import Refused, invalid
from engine.server.request_fields import NO_EFFECT, SAMPLING, UNSUPPORTED, check_sampling

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"prompt": "Hi"}
SERVED = set(CompletionRequest.model_fields) | set(ChatRequest.model_fields)
KNOWN = NO_EFFECT | SAMPLING.keys() | UNSUPPORTED.keys()

# Fields of `CompletionRequest` and `ChatCompletionRequest` of vLLM (its files `protocol.py`, 2026), and of older ones.
VLLM = set(
    re.findall(
        r"\w+",
        """
add_generation_prompt add_special_tokens allowed_token_ids bad_words best_of cache_salt chat_template
chat_template_kwargs continue_final_message documents early_stopping ec_transfer_params echo frequency_penalty
guided_choice guided_decoding_backend guided_grammar guided_json guided_regex guided_whitespace_pattern ignore_eos
include_reasoning include_stop_str_in_output kv_transfer_params length_penalty logit_bias logits_processors
logprob_token_ids logprobs max_completion_tokens max_tokens media_io_kwargs messages min_p min_tokens
mm_processor_kwargs model n parallel_tool_calls presence_penalty priority prompt prompt_embeds prompt_logprobs
reasoning_effort repetition_detection repetition_penalty request_id response_format return_mm_kwargs return_prompt_text
return_token_ids return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start seed session_id
skip_special_tokens spaces_between_special_tokens stop stop_token_ids stream stream_interval stream_options
structural_tag structured_outputs suffix temperature thinking_token_budget tool_choice tools top_k top_logprobs top_p
truncate_prompt_tokens truncation_side use_beam_search user vllm_xargs watermarking
""",
    )
)


def refusal(fields: dict, kind: type[BaseModel] = CompletionRequest, ignore_sampling: bool = False) -> Refused | None:
    """Why a body is refused, or None. `fields` are in addition to the least that there must be."""
    try:
        asked = kind.model_validate((COMPLETION if kind is CompletionRequest else CHAT) | fields)
        if not ignore_sampling:
            check_sampling(asked.sampling)
    except Refused as refused:
        return refused
    except ValidationError as error:
        return invalid(error.errors())
    return None


@pytest.mark.parametrize(
    "names",
    [
        openai_completions.CompletionCreateParamsBase.__annotations__.keys() | {"stream"},
        openai_chat.CompletionCreateParamsBase.__annotations__.keys() | {"stream"},
        VLLM,
    ],
    ids=["openai completions", "openai chat", "vllm"],
)
def test_every_field_of_the_clients_and_of_vllm_is_known(names):
    assert names <= SERVED | KNOWN


def test_a_field_is_of_one_kind():
    assert not NO_EFFECT & (SAMPLING.keys() | UNSUPPORTED.keys() | SERVED)
    assert not SAMPLING.keys() & UNSUPPORTED.keys()
    both = set(CompletionRequest.model_fields) & set(ChatRequest.model_fields)
    assert not UNSUPPORTED.keys() & both


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_field_that_is_not_served_is_taken_if_it_asks_for_nothing_and_else_refused_by_name(kind, name):
    if name in kind.model_fields and name not in SAMPLING:
        pytest.skip("served there")
    assert refusal({name: None}, kind) is None
    asking = {"a": [1]}
    if name in NO_EFFECT:
        assert refusal({name: asking}, kind) is None
        return
    for neutral in {**SAMPLING, **UNSUPPORTED}[name]:
        assert refusal({name: neutral}, kind) is None
    refused = refusal({name: asking}, kind)
    assert refused and (refused.status_code, refused.param) == (400, name) and name in refused.detail


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 0}, "logprobs"),  # asks for the tokens' own; false does not
        ({"n": 2}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperature": 0, "presence_penalty": 0.5}, "presence_penalty"),
        ({"temperature": 0, "logit_bias": {"50256": -100}}, "logit_bias"),
        ({"top_p": 0.9}, "top_p"),
        ({"temperature": 0.7}, "temperature"),
        ({"max_token": 5}, "max_token"),
        ({"MAX_TOKENS": 5}, "MAX_TOKENS"),
        ({"messages": []}, "messages"),
        ({"stream_options": {"include_usages": True}}, "include_usages"),
    ],
)
def test_what_would_change_the_output_and_what_nobody_knows_is_refused(fields, param):
    refused = refusal(fields)
    assert refused and refused.status_code == 400 and refused.param == param


def test_the_unknown_fields_are_named_and_a_near_one_is_proposed():
    refused = refusal({"max_token": 5, "zzz": 1})
    assert refused and "'max_token', 'zzz'" in refused.detail and "give 'max_tokens'" in refused.detail


def test_a_server_that_ignores_sampling_takes_every_value_of_it_and_no_other_field():
    asked = {"temperature": 0.7, "top_p": 0.9, "logit_bias": {"1": 2}}
    assert refusal(asked, ignore_sampling=True) is None
    assert refusal({"n": 2}, ignore_sampling=True)


USAGE = {"stream": True, "stream_options": {"include_usage": True}}
ALWAYS = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionRequest, {"repetition_penalty": 1.0, "max_tokens": 9, "logprobs": None, "ignore_eos": True} | USAGE),
        (CompletionRequest, {"temperature": 0.0, "best_of": 1, "max_tokens": 9, "ignore_eos": True, "stream": True}),
        (ChatRequest, {"temperature": 0.0, "max_completion_tokens": 9, "ignore_eos": True} | USAGE),
        (CompletionRequest, {"max_tokens": 9, "stop": None, "ignore_eos": True} | ALWAYS),
        (ChatRequest, {"max_completion_tokens": 9, "stop": None, "ignore_eos": True} | ALWAYS),
        (ChatRequest, {"n": 1, "temperature": 0, "parallel_tool_calls": False, "max_completion_tokens": 9} | USAGE),
        (ChatRequest, {"user": "u", "metadata": {"a": "b"}, "stream": False, "stream_options": None}),
        (CompletionRequest, {"max_tokens": 9, "min_tokens": 9, "ignore_eos": True, "request_id": "r-1"} | USAGE),
        (ChatRequest, {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}),
        (ChatRequest, {"top_logprobs": 0, "logprobs": False, "tools": [], "tool_choice": "auto", "seed": 1}),
    ],
    ids=[
        *("vllm bench serve", "sglang bench_serving", "vllm bench serve, chat", "guidellm", "guidellm, chat"),
        *("langchain", "litellm", "genai-perf", "openai-python", "vllm's defaults"),
    ],
)
def test_no_client_breaks(kind, fields):
    assert refusal(fields, kind) is None


@pytest.mark.parametrize(
    ("kind", "fields", "says", "param"),
    [
        (CompletionRequest, {"max_tokens": "7"}, "max_tokens must be an integer", "max_tokens"),
        (CompletionRequest, {"max_tokens": 1.5}, "max_tokens must be an integer", "max_tokens"),
        (CompletionRequest, {"max_tokens": 0}, "max_tokens must be at least 1", "max_tokens"),
        (CompletionRequest, {"stop": 5}, "stop must be a string or must be a list", "stop"),
        (CompletionRequest, {"stop": ["a", 5]}, "stop[1] must be a string", "stop[1]"),
        (CompletionRequest, {"stop": ["a"] * 17}, "stop must be a string or must have at most 16 items", "stop"),
        (CompletionRequest, {"stream": "yes"}, "stream must be true or false", "stream"),
        (CompletionRequest, {"stream_options": 3}, "stream_options must be an object", "stream_options"),
        (CompletionRequest, {"temperature": float("inf")}, "temperature must be a finite number", "temperature"),
        (ChatRequest, {"messages": None}, "messages is missing", "messages"),
        (ChatRequest, {"messages": []}, "messages must not be empty", "messages"),
        (ChatRequest, {"messages": [{"content": "a"}]}, "messages[0].role is missing", "messages[0].role"),
        (ChatRequest, {"messages": [{"role": "u", "content": 5}]}, "messages[0].content must", "messages[0].content"),
    ],
)
def test_a_mistake_is_told_in_the_words_of_the_api(kind, fields, says, param):
    refused = refusal(fields, kind)
    assert refused and refused.detail.startswith(says) and refused.param == param


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"a": 1, "a": 2}', "gives a field twice (line 1, column 14)"),
        (b"[" * 2000, "is nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "has a number that is too long"),
        (b'{"a": "\\ud800"}', "has half a surrogate pair"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        *((b'{"a": ' + value + b"}", "is not JSON") for value in (b"NaN", b"-Infinity", b"01", b"'a'", b'"\n"')),
        (b"", "is empty"),
        (b"[1]", "must be an object"),
        (b'{"a": [' + b"[]," * 2**15 + b"[]]}", "has more than"),
        (b'{"a": [' + b"1," * 2**20 + b"1, 1]}", "has more than"),
        (b'{"a": [' + b'"",' * 2**20 + b'""]}', "has more than"),
    ],
)
def test_a_body_that_is_not_one_object_of_a_right_size_is_refused_in_the_words_of_the_api(body, says):
    with pytest.raises(Refused) as refused:
        read_json(body)
    assert refused.value.status_code == 400 and refused.value.detail.startswith(f"the body {says}")


@pytest.mark.parametrize(
    "text", ["[{," * 2**19, '[\\"{' * 2**14, "\\u12ab" * 2**16], ids=["plain", "quotes", "escapes"]
)
def test_what_stands_in_a_text_is_no_value(text):
    assert len(read_json(b'\xef\xbb\xbf{"prompt": "' + text.encode() + b'"}')["prompt"]) > 2**15


def test_the_documents_list_each_field_in_its_place():
    doc = (Path(__file__).parents[1] / "docs/serving.md").read_text()
    section = doc.partition("## Fields of a request")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    listed: dict[str, dict[str, str]] = defaultdict(dict)
    for names, kind, what in rows:
        listed[kind] |= dict.fromkeys(re.findall(r"`(\w+)`", names), what)
    nested = {"include_usage", "continuous_usage_stats"}
    assert listed["served"].keys() == (SERVED - SAMPLING.keys()) | nested
    assert listed["no effect"].keys() == NO_EFFECT | {"include_obfuscation"}
    assert listed["sampling"].keys() == SAMPLING.keys() and listed["refused"].keys() == UNSUPPORTED.keys()
    for name, neutral in {**SAMPLING, **UNSUPPORTED}.items():
        what = (listed["sampling"] | listed["refused"])[name].partition(";")[0]
        assert [json.loads(value) for value in re.findall("`([^`]+)`", what)] == list(neutral), name
    assert set(StreamOptions.model_fields) == nested | {"include_obfuscation"}


def test_the_documents_have_the_limits_of_the_code():
    doc = (Path(__file__).parents[1] / "docs/serving.md").read_text()
    for row in (
        f"values in lists | {MOST_VALUES:,} |",
        f"their fields | {MOST_FIELDS:,} |",
        f"parts of a message | {MOST_MESSAGES:,}, {MOST_PARTS:,} |",
        f"between two chunks | {MAX_HEADER_BYTES // 1024} KiB |",
        f"a head | {HEAD_S:g} s |",
        f"of a body | {BODY_S:g} s |",
        f"open files, less {RESERVED} |",
    ):
        assert row in doc
