"""OpenAI's request bodies, with vLLM's additions and two of ours, and the refusals of those that we cannot serve.

Fields that nobody knows are ignored, as vLLM does; known ones that would change the output are refused.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

MOST_TOKENS = 2**31 - 1
MOST_PROMPTS = 64


def _text(text: str) -> str:
    text.encode()  # JSON can write half a surrogate pair, which is no text; the error is a ValueError
    return text


String = Annotated[str, AfterValidator(_text)]
Count = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MOST_TOKENS)]], Field(min_length=1)]
StopText = Annotated[String, Field(min_length=1, max_length=256)]
Int64 = Annotated[int, Field(ge=-(2**63) + 1, le=2**63 - 1)]

# Where a parameter leaves the output as it is, had it any effect on greedy decoding at all.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (0,),
    "top_p": (1,),
    "top_k": (-1, 0),
    **dict.fromkeys(("min_p", "presence_penalty", "frequency_penalty"), (0,)),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
}
_CHOOSING = ("top_p", "top_k", "min_p")  # of no effect at temperature 0
_UNSUPPORTED: dict[str, Any] = {  # and the value that asks for nothing
    **dict.fromkeys(("n", "best_of"), 1),
    "echo": False,
    "suffix": "",
    **dict.fromkeys(("logprobs", "top_logprobs", "prompt_logprobs"), 0),
    **{name: [] for name in ("tools", "functions", "stop_token_ids", "documents")},
    "chat_template": "",
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), True),
    "include_stop_str_in_output": False,
}


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool = False


class Generate(BaseModel):
    """The fields that both kinds of request have."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: String | None = Field(None, max_length=1024)
    max_tokens: Count | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=MOST_TOKENS)
    priority: Int64 = Field(0, description="Smaller is more urgent; a scheduler sees it.")
    user: String | None = Field(None, max_length=1024, description="Who asks, for fair sharing; a scheduler sees it.")
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
    def shown(self) -> dict[str, Any]:
        """What a scheduler sees of the request, beside its lengths: fields of `traces.request.TraceRequest`."""
        return {"predicted_length": self.predicted_length, "priority": self.priority, "client": self.user}

    @property
    def limit(self) -> int | None:
        """Output tokens that the client asks for."""
        return self.max_tokens

    def check_supported(self, ignore_sampling: bool) -> None:
        """Raise `Refused` for the first field that asks for something we do not do."""
        given = dict(self)
        for name, nothing in _UNSUPPORTED.items():
            if given.get(name) not in (None, nothing):
                raise Refused(400, f"{name} is not supported", name)
        chosen = _CHOOSING if given.get("temperature") == 0 else ()
        for name, allowed in _NEUTRAL.items() if not ignore_sampling else ():
            if given.get(name) not in (None, *allowed) and name not in chosen:
                message = (
                    f"{name} would change the output, and decoding here is greedy: leave it out, or give "
                    f"{allowed[0]!r}; a server started with --ignore-sampling takes no notice of it"
                )
                raise Refused(400, message, name)


class CompletionRequest(Generate):
    """POST /v1/completions."""

    prompt: (
        String
        | TokenIds
        | Annotated[list[String], Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    max_tokens: Count | None = 16
    add_special_tokens: bool | None = Field(None, description="To a text; default: true.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts. Each is answered by a choice of its own."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(BaseModel):
    """A piece of a message."""

    type: Literal["text"]
    text: String


def _text_alone(content: Any) -> Any:
    for place, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise ValueError(f"part {place} is {part['type']!r}, and the model reads text alone")
    return content


def _arguments(given: Any) -> Any:
    """Arguments as an object, which most chat templates take; OpenAI's are its JSON. "" and null are none."""
    try:
        parsed = json.loads(given or "{}") if isinstance(given, str) else given
    except ValueError:
        parsed = given
    if parsed is not None and not isinstance(parsed, dict):
        raise ValueError("give a JSON object")
    return parsed or {}


class FunctionCall(BaseModel):
    """A function's name and arguments."""

    name: String
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments, json_schema_input_type=String | dict[str, Any])]


class ToolCall(BaseModel):
    """A tool that the model called."""

    id: String | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: String = Field(max_length=64)
    content: Annotated[String | list[TextPart] | None, BeforeValidator(_text_alone)] = None
    name: String | None = None
    reasoning_content: String | None = None
    tool_call_id: String | None = None
    tool_calls: list[ToolCall] | None = None

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

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    add_generation_prompt: bool | None = Field(None, description="Default: unless the final message is continued.")
    continue_final_message: bool | None = Field(None, description="The output continues the last message.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template's own.")
    add_special_tokens: bool | None = Field(None, description="To what the chat template writes; default: false.")

    @property
    def how(self) -> dict[str, bool]:
        """How the conversation is to end, for the chat template. Raises `Refused` if it is to end in two ways."""
        goes_on = bool(self.continue_final_message)
        if goes_on and self.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt exclude each other: leave one out"
            raise Refused(400, message, "continue_final_message")
        adds = not goes_on if self.add_generation_prompt is None else self.add_generation_prompt
        return {"add_generation_prompt": adds, "continue_final_message": goes_on}

    @property
    def limit(self) -> int | None:
        """As in `Generate`."""
        return self.max_completion_tokens or self.max_tokens


class ErrorDetail(BaseModel):
    """OpenAI's."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


class Refused(HTTPException):
    """A request that gets an error for an answer; `param` is the field that is to blame."""

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = {401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError"}
        name = kind.get(self.status_code, "InternalServerError" if self.status_code >= 500 else "BadRequestError")
        return {"error": {"message": self.detail, "type": name, "param": self.param, "code": self.status_code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status_code, self.headers)
