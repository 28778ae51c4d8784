"""OpenAI's request bodies, with vLLM's additions and two of ours: the fields that are served.

`engine.server.request_fields` deals with all others.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from engine.server.refused import Refused
from engine.server.request_fields import asked_fields

MOST_TOKENS = 2**31 - 1
MOST_PROMPTS = 64
MOST_MESSAGES = 2**13
MOST_PARTS = 2**10  # of a message

Count = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Int64 = Annotated[int, Field(ge=-(2**63) + 1, le=2**63 - 1)]
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_PROMPTS = {
    "anyOf": [{"type": "string"}, _IDS, *({"type": "array", "items": each} for each in ({"type": "string"}, _IDS))]
}


class _Fields(BaseModel):
    """Takes no notice of fields without effect, and refuses those that are not served."""

    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _asked(cls, given: Any) -> Any:
        return asked_fields(given, cls.model_fields) if isinstance(given, dict) else given


class StreamOptions(_Fields):
    """Options of a stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="vLLM's: with include_usage, counts in every chunk.")
    include_obfuscation: bool = Field(False, description="Of no effect.")


class Generate(_Fields):
    """The fields that both kinds of request have."""

    model: str | None = Field(None, max_length=1024)
    max_tokens: Count | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=MOST_TOKENS)
    priority: Int64 = Field(0, description="Smaller is more urgent; a scheduler sees it.")
    user: str | None = Field(None, max_length=1024, description="Who asks, for fair sharing; a scheduler sees it.")
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False, description="Decoding is greedy: 0, or absent.")
    output_len: Count | None = Field(
        None, description="Tandem's: stop after this many tokens, unknown to the scheduler."
    )
    predicted_length: Count | None = Field(None, description="Tandem's: an estimate that a scheduler sees.")

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_usage_always(self) -> bool:
        """Whether each chunk of a stream has token counts."""
        return self.wants_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampling parameters that were given."""
        return {"temperature": self.temperature, **(self.model_extra or {})}

    @property
    def shown(self) -> dict[str, Any]:
        """What a scheduler sees of the request, beside its lengths: fields of `traces.request.TraceRequest`."""
        return {"predicted_length": self.predicted_length, "priority": self.priority, "client": self.user}

    @property
    def limit(self) -> int | None:
        """Output tokens that the client asks for."""
        return self.max_tokens


class CompletionRequest(Generate):
    """POST /v1/completions."""

    prompt: Annotated[Any, WithJsonSchema(_PROMPTS)]
    max_tokens: Count | None = 16
    echo: bool = Field(False, description="Begin the answer with the prompt.")
    add_special_tokens: bool = Field(True, description="Begin a text with the tokens that the model wants there.")

    @property
    def prompts(self) -> list[Any]:
        """The prompts, which are texts or lists of token ids. Each is answered by a choice of its own."""
        several = isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], str | list)
        return list(self.prompt) if several else [self.prompt]


class TextPart(BaseModel):
    """A piece of a message."""

    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(fail_fast=True, max_length=MOST_PARTS)]


def _text_alone(content: Any) -> Any:
    for place, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise ValueError(f"part {place} is {part['type']!r}, and the model reads text alone")
    return content


def _arguments(given: Any) -> Any:
    """Arguments as an object, which most chat templates take; OpenAI's are its JSON. "" and null are none."""
    try:
        parsed = json.loads(given or "{}") if isinstance(given, str) else given
    except (ValueError, RecursionError):
        parsed = given
    if parsed is not None and not isinstance(parsed, dict):
        raise ValueError("give a JSON object")
    return parsed or {}


class FunctionCall(BaseModel):
    """A function's name and arguments."""

    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments, json_schema_input_type=str | dict[str, Any])]


class ToolCall(BaseModel):
    """A tool that the model called."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(max_length=64)
    content: Annotated[str | Parts | None, BeforeValidator(_text_alone)] = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MOST_PARTS)] | None = None

    @model_validator(mode="after")
    def _is_read_whole(self) -> Message:
        extra = self.model_extra or {}
        for name in ("audio", "function_call", "refusal"):
            if extra.get(name) is not None:
                raise ValueError(f"{name} is not supported")
        if self.content is None and self.role != "assistant":
            raise ValueError("content is null or missing, which is for an assistant's message alone")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        known = self.model_dump(include=set(type(self).model_fields), exclude_none=True)
        return {"content": ""} | known


class ChatRequest(Generate):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Count | None = None
    add_generation_prompt: bool | None = Field(None, description="Default: unless the final message is continued.")
    continue_final_message: bool = Field(False, description="The output continues the last message.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="Variables of the chat template's own.")
    add_special_tokens: bool = Field(False, description="Begin with the model's special tokens, beside the template's.")

    @property
    def how(self) -> dict[str, bool]:
        """How the conversation is to end, for the chat template. Raises `Refused` if it is to end in two ways."""
        goes_on = self.continue_final_message
        if goes_on and self.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt exclude each other: leave one out"
            raise Refused(400, message, "continue_final_message")
        adds = not goes_on if self.add_generation_prompt is None else self.add_generation_prompt
        return {"add_generation_prompt": adds, "continue_final_message": goes_on}

    @property
    def limit(self) -> int | None:
        """As in `Generate`."""
        return self.max_completion_tokens or self.max_tokens
