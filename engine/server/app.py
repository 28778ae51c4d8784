"""The HTTP side: routes, limits, and one error format. It may not know which engine driver serves."""

from __future__ import annotations

import asyncio
import hmac
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.server.detokenization import Writer
from engine.server.engine_client import EngineClient
from engine.server.host_check import HostCheck
from engine.server.json_body import JsonRoute
from engine.server.openai_format import Asked, ChatFormat, CompletionFormat
from engine.server.protocol import MOST_PROMPTS, ChatRequest, CompletionRequest, Generate
from engine.server.refused import ErrorBody, Refused
from engine.server.request_fields import check_sampling
from engine.server.response import Answer
from engine.server.tokenization import Text
from engine.stop_condition import StopCondition
from traces.request import TraceRequest

INLINE_CHARACTERS = 4096  # a prompt up to this long is read in about a millisecond; longer ones are read by a thread
LONGEST_ID = 20  # digits of a token id that a message quotes
PER_MESSAGE = 64  # characters of a prompt that take as long as one message of a chat template
RETRY_AFTER_S = "1"
_CLOSE = {"Connection": "close"}
Result = TypeVar("Result")
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
        hosts: the names that clients may use for it.
    """

    model: str
    max_waiting: int = 4096
    max_body_bytes: int = 16 * 2**20
    api_key: str | None = None
    ignore_sampling: bool = False
    hosts: HostCheck = field(default_factory=partial(HostCheck, "localhost"))


def build_app(engine: EngineClient, text: Text, limits: ServerLimits) -> ASGIApp:
    """The application, behind its guards."""
    app = FastAPI(title="Tandem", version=version("tandem-llm"), docs_url=None, redoc_url=None)
    api = _Api(engine, text, limits)
    errors: dict[int | str, Any] = {
        status: {"model": ErrorBody} for status in (400, 401, 403, 404, 413, 415, 429, 500, 503)
    }
    post = partial(app.router.add_api_route, methods=["POST"], responses=errors, route_class_override=JsonRoute)
    post("/v1/completions", api.completions)
    post("/v1/chat/completions", api.chat)
    app.get("/v1/models", responses={401: errors[401]})(api.models)
    app.get("/health", responses={503: errors[503]})(api.health)
    app.get("/version")(api.version)
    app.get("/metrics", response_class=PlainTextResponse)(api.metrics)
    app.get("/status")(api.status)
    app.get("/", response_class=HTMLResponse, include_in_schema=False)(api.page)
    for kind in (HTTPException, Exception):
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
        prompts = [await self._ids(prompt, body.add_special_tokens) for prompt in body.prompts]
        echoes = [self._text_of(prompt) for prompt in body.prompts] if body.echo else None
        return self._answer(body, prompts, arrived_ns, CompletionFormat, echoes)

    async def chat(self, body: ChatRequest) -> Answer:
        """Continue a conversation, written by the model's chat template."""
        arrived_ns = time.perf_counter_ns()
        self._check(body, 1)
        prompt = await self._read(await self._written(body), body.add_special_tokens)
        return self._answer(body, [prompt], arrived_ns, ChatFormat)

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
        if not self._limits.ignore_sampling:
            check_sampling(body.sampling)
        if prompts > MOST_PROMPTS:
            raise Refused(400, f"{prompts} prompts: give at most {MOST_PROMPTS} at once", "prompt")
        if self._engine.without_token + prompts > self._limits.max_waiting:
            message = f"{self._engine.without_token} requests wait for their first token: try again later"
            raise Refused(429, message, headers={"Retry-After": RETRY_AFTER_S})

    async def _written(self, body: ChatRequest) -> str:
        """The prompt that the chat template makes of a conversation."""
        variables = body.chat_template_kwargs
        if taken := sorted(self._text.chat.reserved & variables.keys()):
            raise Refused(400, f"{taken[0]} is no variable of a chat template's own", "chat_template_kwargs")
        messages = [message.plain() for message in body.messages]
        length = sum(len(str(message)) for message in messages) + PER_MESSAGE * len(messages)
        try:
            return await _inline_or_not(partial(self._text.chat.render, messages, variables, **body.how), length)
        except ValueError as error:
            raise Refused(400, str(error), "messages") from None

    async def _ids(self, prompt: Any, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            return await self._read(prompt, add_special_tokens)
        if not isinstance(prompt, list):
            raise Refused(400, "prompt must be a text, a list of token ids, or a list of either", "prompt")
        if not prompt:
            raise Refused(400, "the prompt is empty", "prompt")
        longest, vocab_size = self._engine.ready.config.max_model_len, self._engine.ready.facts["vocab_size"]
        if len(prompt) > longest:
            raise Refused(400, f"a prompt of {len(prompt)} tokens is more than {longest}, the longest here", "prompt")
        if {*map(type, prompt)} != {int} or min(prompt) < 0:
            raise Refused(400, "prompt must be token ids, which are integers of 0 or more, or a text", "prompt")
        if max(prompt) >= vocab_size:
            token, name = str(max(prompt))[:LONGEST_ID], self._text.name_beyond(prompt, vocab_size)
            raise Refused(400, f"token id {token} is not in the vocabulary, which has {vocab_size}{name}", "prompt")
        return prompt

    def _text_of(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else str(self._text.tokens.decode(prompt))

    async def _read(self, text: str, add_special_tokens: bool) -> list[int]:
        longest = self._engine.ready.config.max_model_len * self._text.longest
        if len(text) > longest:
            raise Refused(400, f"a prompt of {len(text)} characters is more than {longest}, which cannot fit", "prompt")
        try:
            ids = await _inline_or_not(partial(self._text.encode, text, add_special_tokens), len(text))
        except Exception as error:  # the tokenizer's, which has no type of its own
            raise Refused(400, f"the tokenizer cannot read the prompt: {error}", "prompt") from error
        if not ids:
            raise Refused(400, "the prompt is empty", "prompt")
        return ids

    def _answer(
        self,
        body: Generate,
        prompts: Sequence[list[int]],
        arrived_ns: int,
        format: type[CompletionFormat],
        echoes: Sequence[str] | None = None,
    ) -> Answer:
        self._check_alive()  # it may have died, or been told to stop, while the prompt was read
        sources = [self._source(body, ids) for ids in prompts]
        condition = StopCondition(body.ignore_eos, body.min_tokens, body.output_len)
        self._answers += 1
        asked = Asked([len(ids) for ids in prompts], echoes, body.wants_usage, body.wants_usage_always)
        written = format(self._answers, int(time.time()), self._limits.model, asked)
        writers = [Writer(self._text.detokenizer, ids, body.stops, body.min_tokens) for ids in prompts]
        facts = self._engine.ready.facts
        stop_tokens = () if body.ignore_eos else facts["stop_tokens"]
        answer = Answer(self._engine, written, bool(body.stream), writers, stop_tokens)
        for output, source, ids in zip(answer.outputs, sources, prompts, strict=True):
            output.note = self._text.name_beyond(ids, facts["vocab_size"])
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
    """Checks a request's host, API key and size before it is read. Plain ASGI: streams pass through it."""

    def __init__(self, app: ASGIApp, limits: ServerLimits) -> None:
        self._app = app
        self._limit = limits.max_body_bytes
        self._key = None if limits.api_key is None else limits.api_key.encode()
        self._hosts = limits.hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        try:
            self._check_host(headers.get(b"host"), scope["http_version"])
            self._check_key(headers.get(b"authorization", b""), scope["path"])
            if int(headers.get(b"content-length") or 0) > self._limit:
                raise self._too_large()
        except Refused as refused:
            return await refused.response()(scope, receive, send)
        await self._app(scope, self._receive_within_limit(receive), send)

    def _check_host(self, host: bytes | None, http_version: str) -> None:
        if host is None and http_version != "1.0":
            raise Refused(400, "there is no Host", headers=_CLOSE)
        if host is not None and not self._hosts.allows(host):
            name = host[:64].decode("latin-1")
            message = (
                f"Host is {name!r}, which is no name of this server: call it localhost, or start it with --allow-host"
            )
            raise Refused(403, message, headers=_CLOSE)

    def _check_key(self, given: bytes, path: str) -> None:
        if self._key is None or not path.startswith("/v1"):
            return
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            raise Refused(401, "this server wants an API key: Authorization: Bearer KEY", headers=_CLOSE)

    def _too_large(self) -> Refused:
        return Refused(413, f"the body is longer than {self._limit} bytes", headers=_CLOSE)

    def _receive_within_limit(self, receive: Receive) -> Receive:
        read = 0

        async def receive_within_limit() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise self._too_large()
            return message

        return receive_within_limit


async def _inline_or_not(work: Callable[[], Result], characters: int) -> Result:
    """Do work on a text that long: in a thread, if others would wait for it."""
    return work() if characters <= INLINE_CHARACTERS else await asyncio.to_thread(work)


async def _answer_error(_: Request, error: Exception) -> Response:
    """The traceback of a fault is logged by our caller."""
    match error:
        case Refused():
            refused = error
        case HTTPException():
            refused = Refused(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        case _:
            refused = Refused(500, f"the server is at fault: {type(error).__name__}: {error}")
    return refused.response()
