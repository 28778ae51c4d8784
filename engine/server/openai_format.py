"""The formats of OpenAI's two APIs. Chunks are put together from text, since a server writes one a token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

DONE = b"data: [DONE]\n\n"


class CompletionFormat:
    """`/v1/completions`, for one answer."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"
    opening, closing = '"text": ', ""  # around a chunk's text

    def __init__(self, number: int, created: int, model: str, usage: bool) -> None:
        """`usage`: whether a stream ends with token counts, and so has the field in every chunk."""
        self.id = f"{self.prefix}-{number}"
        self._head = {"id": self.id, "created": created, "model": model}
        self._usage = usage
        head = json.dumps(self._head | {"object": self.chunk})[:-1]
        self._before = f'data: {head}, "choices": [{{"index": '
        self._after = "}], " + '"usage": null}\n\n' if usage else "}]}\n\n"

    def text(self, index: int, text: str, finish_reason: str | None = None) -> bytes:
        """A chunk of a stream."""
        return self._chunk(index, f"{self.opening}{quoted(text)}{self.closing}", finish_reason)

    def _chunk(self, index: int, content: str, finish_reason: str | None = None) -> bytes:
        end = f'"finish_reason": "{finish_reason}"' if finish_reason else '"finish_reason": null'
        return f'{self._before}{index}, {content}, "logprobs": null, {end}{self._after}'.encode("ascii")

    def open(self, index: int) -> bytes:
        """The chunk before an output's first text."""
        return b""

    def usage(self, counts: dict[str, Any]) -> bytes:
        """The chunk before the end, if it was asked for."""
        body = self._head | {"object": self.chunk, "choices": [], "usage": counts}
        return f"data: {json.dumps(body)}\n\n".encode() if self._usage else b""

    def answer(self, choices: Sequence[dict[str, Any]], counts: dict[str, Any]) -> dict[str, Any]:
        """The whole, not streamed."""
        return self._head | {"object": self.whole, "choices": choices, "usage": counts}

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """One output of the whole."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason, "stop_reason": None}


class ChatFormat(CompletionFormat):
    """`/v1/chat/completions`, for one answer."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"
    opening, closing = '"delta": {"content": ', "}"

    def open(self, index: int) -> bytes:
        """The chunk that names the speaker."""
        return self._chunk(index, '"delta": {"role": "assistant", "content": ""}')

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """As in `CompletionFormat`."""
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}
