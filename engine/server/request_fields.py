"""The fields of a request that have no part in our answers: accepted, or refused by name.

A field is served (`engine.server.protocol` declares it), has no effect, or is refused, unless it asks for nothing.
Any other is unknown, and refused. A field that is null is as if it were absent.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from engine.server.refused import Refused

NAMED = 5  # unknown fields that a message names
LONGEST_NAME = 64

# They leave the text and its form as they are.
NO_EFFECT = frozenset(
    (
        *("metadata", "store", "service_tier", "safety_identifier", "prediction", "seed"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "parallel_tool_calls"),
        *("request_id", "session_id", "spaces_between_special_tokens", "truncation_side", "return_mm_kwargs"),
    )
)

# Sampling parameters, and the values that leave greedy decoding as it is.
SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (0,),
    "top_p": (1,),
    "top_k": (-1, 0, 1),
    **dict.fromkeys(("min_p", "presence_penalty", "frequency_penalty"), (0,)),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
}
CHOOSING = frozenset(("top_p", "top_k", "min_p"))  # of no effect at temperature 0

# Everything else that is known, and the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("n", "best_of", "length_penalty", "stream_interval"), (1,)),
    **dict.fromkeys(("use_beam_search", "early_stopping", "watermarking"), (False,)),
    "suffix": ("",),
    "echo": (False,),
    **dict.fromkeys(("logprobs", "return_tokens_as_token_ids", "return_token_ids", "return_prompt_text"), (False,)),
    **dict.fromkeys(("return_token_offsets", "include_stop_str_in_output", "continue_final_message"), (False,)),
    **dict.fromkeys(("top_logprobs", "routed_experts_prompt_start"), (0,)),
    **dict.fromkeys(("prompt_logprobs", "logprob_token_ids", "allowed_token_ids", "truncate_prompt_tokens"), ()),
    **dict.fromkeys(("skip_special_tokens", "detokenize", "add_generation_prompt", "include_reasoning"), (True,)),
    **dict.fromkeys(("tools", "functions", "stop_token_ids", "bad_words", "documents", "logits_processors"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "response_format": ({"type": "text"},),
    **dict.fromkeys(("structured_outputs", "structural_tag", "guided_json", "guided_regex", "guided_choice"), ()),
    **dict.fromkeys(("guided_grammar", "guided_decoding_backend", "guided_whitespace_pattern"), ()),
    **dict.fromkeys(("chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs", "vllm_xargs"), ({},)),
    **dict.fromkeys(("chat_template", "prompt_embeds", "cache_salt", "kv_transfer_params", "ec_transfer_params"), ()),
    **dict.fromkeys(("repetition_detection", "audio", "web_search_options", "moderation"), ()),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "thinking_token_budget": (-1,),
    "verbosity": ("medium",),
}


def asked_fields(given: Mapping[str, Any], served: Collection[str]) -> dict[str, Any]:
    """The fields that are served, or are for `check_sampling`, and that are not null.

    Raises `Refused` for unknown fields, and for the first that asks for something we do not do.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if unknown := [name for name in asked if name not in served and not _is_known(name)]:
        raise _unknown(unknown, served)
    for name, value in asked.items():
        if name not in served and name in UNSUPPORTED and not _is_one_of(value, UNSUPPORTED[name]):
            raise Refused(400, f"{name} is not supported: {_remedy(UNSUPPORTED[name])}", name)
    return {name: value for name, value in asked.items() if name in served or name in SAMPLING}


def check_sampling(asked: Mapping[str, Any]) -> None:
    """Raise `Refused` for the first sampling parameter that would change greedy output; others are not asked about."""
    greedy = asked.get("temperature") == 0
    for name, value in asked.items():
        neutral = SAMPLING[name]
        if not (value is None or _is_one_of(value, neutral) or (greedy and name in CHOOSING)):
            message = (
                f"{name} would change the output, and decoding here is greedy: {_remedy(neutral)}; "
                "a server started with --ignore-sampling takes no notice of it"
            )
            raise Refused(400, message, name)


def _is_known(name: str) -> bool:
    return name in NO_EFFECT or name in SAMPLING or name in UNSUPPORTED


def _is_one_of(value: Any, neutral: Collection[Any]) -> bool:
    """Whether a value asks for nothing. JSON's false is not its 0."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)


def _remedy(neutral: tuple[Any, ...]) -> str:
    return f"leave it out, or give {json.dumps(neutral[0])}" if neutral else "leave it out"


def _unknown(names: list[str], served: Collection[str]) -> Refused:
    shown = [repr(name[:LONGEST_NAME]) for name in names[:NAMED]]
    message = f"{', '.join(shown)}{' and more' if len(names) > NAMED else ''}: no such field here; leave it out"
    near = get_close_matches(names[0][:LONGEST_NAME], served, 1)
    return Refused(400, message + (f", or give {near[0]!r}" if near else ""), names[0][:LONGEST_NAME])
