"""The HTTP side: routes, limits, and one error format. It may not know which engine driver serves."""

from __future__ import annotations

import asyncio
import hmac
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.server.engine_client import EngineClient
from engine.server.openai_format import ChatFormat, CompletionFormat
from engine.server.protocol import MOST_PROMPTS, ChatRequest, CompletionRequest, ErrorBody, Generate, Refused
from engine.server.response import Answer
from engine.server.tokenization import Text, Writer
from engine.stop_condition import StopCondition
from traces.request import TraceRequest

INLINE_CHARACTERS = 4096  # a prompt up to this long is read in about a millisecond; longer ones are read by a thread
RETRY_AFTER_S = "1"
_CLOSE = {"Connection": "close"}
STATUS_PAGE = Path(__file__).with_name("status.html")


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """The server's limits for its clients.

    Attributes:
        model: the name it answers to.
        max_waiting: requests without a token at which further ones are turned away.
        max_body_bytes: longest request body.
        api_key: the key that `/v1` asks for, or None.
        ignore_sampling: take no notice of sampling parameters, where they would get a 400.
    """

    model: str
    max_waiting: int = 4096
    max_body_bytes: int = 16 * 2**20
    api_key: str | None = None
    ignore_sampling: bool = False


def build_app(engine: EngineClient, text: Text, limits: ServerLimits) -> ASGIApp:
    """The application, behind its guards."""
    app = FastAPI(title="Tandem", version=version("tandem-llm"), docs_url=None, redoc_url=None)
    api = _Api(engine, text, limits)
    errors: dict[int | str, Any] = {status: {"model": ErrorBody} for status in (400, 401, 404, 413, 429, 500, 503)}
    app.post("/v1/completions", responses=errors)(api.completions)
    app.post("/v1/chat/completions", responses=errors)(api.chat)
    app.get("/v1/models", responses={401: errors[401]})(api.models)
    app.get("/health", responses={503: errors[503]})(api.health)
    app.get("/version")(api.version)
    app.get("/metrics", response_class=PlainTextResponse)(api.metrics)
    app.get("/status")(api.status)
    app.get("/", response_class=HTMLResponse, include_in_schema=False)(api.page)
    for kind in (RequestValidationError, HTTPException, RecursionError, Exception):
        app.exception_handler(kind)(_answer_error)
    return Guard(app, limits)


class _Api:
    """The handlers."""

    def __init__(self, engine: EngineClient, text: Text, limits: ServerLimits) -> None:
        self._engine = engine
        self._text = text
        self._limits = limits
        self._page = STATUS_PAGE.read_text(encoding="utf-8")
        self._answers = 0

    async def completions(self, body: CompletionRequest) -> Answer:
        """Complete prompts: text or token ids, one or several."""
        arrived_ns = time.perf_counter_ns()
        self._check(body, len(body.prompts))
        prompts = [await self._ids(prompt) for prompt in body.prompts]
        return self._answer(body, prompts, arrived_ns, CompletionFormat)

    async def chat(self, body: ChatRequest) -> Answer:
        """Continue a conversation, written by the model's chat template."""
        arrived_ns = time.perf_counter_ns()
        self._check(body, 1)
        try:
            written = self._text.chat([message.plain() for message in body.messages])
        except ValueError as error:
            raise Refused(400, str(error), "messages") from None
        return self._answer(body, [await self._read(written, add_special_tokens=False)], arrived_ns, ChatFormat)

    async def models(self) -> dict[str, Any]:
        """The one model."""
        ready = self._engine.ready
        model = {"id": self._limits.model, "object": "model", "created": 0, "owned_by": "tandem"}
        limits = {"root": ready.facts["model"], "max_model_len": ready.config.max_model_len}
        return {"object": "list", "data": [model | limits]}

    async def health(self) -> dict[str, str]:
        """200 while requests can be served; 503 once the engine is dead or the server is shutting down."""
        self._check_alive()
        return {"status": "ok"}

    async def version(self) -> dict[str, str]:
        """Tandem's."""
        return {"version": version("tandem-llm")}

    async def metrics(self) -> PlainTextResponse:
        """Prometheus."""
        text = generate_latest(self._engine.metrics)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status(self) -> dict[str, Any]:
        """The numbers that the status page draws."""
        engine, metrics = self._engine, self._engine.metrics
        return {
            "time_s": time.perf_counter(),
            "alive": engine.error is None,
            "model": self._limits.model,
            "facts": engine.ready.facts,
            "scheduler": engine.ready.config.scheduler,
            "kv_blocks": engine.ready.config.num_blocks,
            "max_seqs": engine.ready.config.max_seqs,
            "open": engine.open_requests,
            "load": metrics.load._asdict(),
            "generated": metrics.generated,
            "outcomes": dict(metrics.outcomes),
            "ttft": metrics.first_tokens.in_ms(),
            "itl": metrics.gaps.in_ms(),
        }

    async def page(self) -> HTMLResponse:
        """The status page."""
        return HTMLResponse(self._page)

    def _check_alive(self) -> None:
        if self._engine.error is not None or self._engine.draining:
            raise Refused(503, self._engine.error or "the server is shutting down")

    def _check(self, body: Generate, prompts: int) -> None:
        self._check_alive()
        if body.model is not None and body.model != self._limits.model:
            raise Refused(404, f"no model {body.model!r} here: this is {self._limits.model!r}", "model")
        body.check_supported(self._limits.ignore_sampling)
        if prompts > MOST_PROMPTS:
            raise Refused(400, f"{prompts} prompts: give at most {MOST_PROMPTS} at once", "prompt")
        if self._engine.without_token + prompts > self._limits.max_waiting:
            message = f"{self._engine.without_token} requests wait for their first token: try again later"
            raise Refused(429, message, headers={"Retry-After": RETRY_AFTER_S})

    async def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await self._read(prompt)
        if max(prompt) >= (vocab_size := self._engine.ready.facts["vocab_size"]):
            raise Refused(400, f"token id {max(prompt)} is not in the vocabulary, which has {vocab_size}", "prompt")
        return prompt

    async def _read(self, text: str, add_special_tokens: bool = True) -> list[int]:
        longest = self._engine.ready.config.max_model_len * self._text.longest
        if len(text) > longest:
            raise Refused(400, f"a prompt of {len(text)} characters is more than {longest}, which cannot fit", "prompt")
        try:
            encode = partial(self._text.encode, text, add_special_tokens)
            ids = encode() if len(text) <= INLINE_CHARACTERS else await asyncio.to_thread(encode)
        except Exception as error:  # the tokenizer's, which has no type of its own
            raise Refused(400, f"the tokenizer cannot read the prompt: {error}", "prompt") from error
        if not ids:
            raise Refused(400, "the prompt is empty", "prompt")
        return ids

    def _answer(
        self, body: Generate, prompts: Sequence[list[int]], arrived_ns: int, format: type[CompletionFormat]
    ) -> Answer:
        sources = [self._source(body, ids) for ids in prompts]
        condition = StopCondition(body.ignore_eos, body.min_tokens, body.output_len)
        self._answers += 1
        written = format(self._answers, int(time.time()), self._limits.model, body.wants_usage)
        writers = [Writer(self._text.tokens, body.stops, body.min_tokens) for _ in prompts]
        answer = Answer(self._engine, written, bool(body.stream), writers)
        for output, source in zip(answer.outputs, sources, strict=True):
            answer.prompt_tokens += source.prompt_len
            output.request_id = self._engine.submit(output, source, arrived_ns, condition)
        return answer

    def _source(self, body: Generate, ids: list[int]) -> TraceRequest:
        prompt_len, limit = len(ids), self._limit(body, len(ids))
        return TraceRequest(0, 0, prompt_len, limit, limit, array("i", ids), **body.shown)

    def _limit(self, body: Generate, prompt_len: int) -> int:
        longest = self._engine.ready.config.max_model_len
        room = longest - prompt_len
        limit = room if body.limit is None else body.limit
        if limit < 1 or limit > room:
            asked = "" if body.limit is None else f" and {body.limit} new ones"
            message = f"a prompt of {prompt_len} tokens{asked} is more than {longest}, the longest here"
            raise Refused(400, message, "prompt")
        if body.min_tokens > limit:
            raise Refused(400, f"min_tokens is {body.min_tokens}, more than max_tokens, {limit}", "min_tokens")
        return limit


class Guard:
    """Checks a request's size and API key before it is read. Plain ASGI: streams pass through it."""

    def __init__(self, app: ASGIApp, limits: ServerLimits) -> None:
        self._app = app
        self._limit = limits.max_body_bytes
        self._key = None if limits.api_key is None else f"Bearer {limits.api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        if self._key is not None and scope["path"].startswith("/v1") and not hmac.compare_digest(given, self._key):
            refused = Refused(401, "this server wants an API key: Authorization: Bearer KEY", headers=_CLOSE)
            return await refused.response()(scope, receive, send)
        too_large = Refused(413, f"the body is longer than {self._limit} bytes", headers=_CLOSE)
        if int(headers.get(b"content-length") or 0) > self._limit:
            return await too_large.response()(scope, receive, send)
        read = 0

        async def receive_within_limit() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:  # raised in the middle of FastAPI's reading, which passes on nothing else
                raise HTTPException(413, too_large.detail)
            return message

        await self._app(scope, receive_within_limit, send)


async def _answer_error(_: Request, error: Exception) -> JSONResponse:
    """The traceback of a fault is logged by our caller."""
    match error:
        case Refused():
            refused = error
        case RequestValidationError():
            refused = _invalid(error.errors()[0])
        case HTTPException():
            refused = Refused(error.status_code, str(error.detail))
        case RecursionError():
            refused = Refused(400, "the body is nested too deeply")
        case _:
            refused = Refused(500, f"the server is at fault: {type(error).__name__}: {error}")
    return refused.response()


def _invalid(first: dict[str, Any]) -> Refused:
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is not JSON: {first['ctx']['error']}")
    where = ".".join(str(part) for part in first["loc"][1:])
    return Refused(400, f"{where or 'body'}: {first['msg']}", where or None)
