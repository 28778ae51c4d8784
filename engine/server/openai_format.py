"""The formats of OpenAI's two APIs. Chunks are put together from text, since a server writes one a token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Asked:
    """What of an answer's form its request decides.

    Attributes:
        prompt_lens: tokens of each output's prompt.
        echoes: text with which each output begins, if any.
        usage: whether a stream ends with token counts, and so has the field in every chunk.
        usage_always: whether the field of every chunk has the counts of its output so far.
    """

    prompt_lens: Sequence[int]
    echoes: Sequence[str] | None = None
    usage: bool = False
    usage_always: bool = False


def counts(prompt_tokens: int, made: int) -> dict[str, int]:
    """Tokens, as OpenAI counts them."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": made, "total_tokens": prompt_tokens + made}


class CompletionFormat:
    """`/v1/completions`, for one answer."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"
    opening, closing = '"text": ', ""  # around a chunk's text

    def __init__(self, number: int, created: int, model: str, asked: Asked) -> None:
        self.id = f"{self.prefix}-{number}"
        self.asked = asked
        self._head = {"id": self.id, "created": created, "model": model}
        head = json.dumps(self._head | {"object": self.chunk})[:-1]
        self._before = f'data: {head}, "choices": [{{"index": '
        self._after = "}], " + '"usage": null}\n\n' if asked.usage else "}]}\n\n"

    def text(self, index: int, text: str, made: int, finish_reason: str | None = None) -> bytes:
        """A chunk of a stream: an output's text, with which it has `made` so many tokens."""
        return self._chunk(index, f"{self.opening}{quoted(text)}{self.closing}", made, finish_reason)

    def _chunk(self, index: int, content: str, made: int, finish_reason: str | None = None) -> bytes:
        end = f'"finish_reason": "{finish_reason}"' if finish_reason else '"finish_reason": null'
        after = self._counted(index, made) if self.asked.usage_always else self._after
        return f'{self._before}{index}, {content}, "logprobs": null, {end}{after}'.encode("ascii")

    def _counted(self, index: int, made: int) -> str:
        return f'}}], "usage": {json.dumps(counts(self.asked.prompt_lens[index], made))}}}\n\n'

    def open(self, index: int) -> bytes:
        """The chunk before an output's first text: the prompt, if it is wanted again."""
        return self._chunk(index, f'"text": {quoted(self.asked.echoes[index])}', 0) if self.asked.echoes else b""

    def usage(self, made: int) -> bytes:
        """The chunk before the end, if it was asked for. `made`: tokens of all outputs."""
        body = self._head | {"object": self.chunk, "choices": [], "usage": self._total(made)}
        return f"data: {json.dumps(body)}\n\n".encode() if self.asked.usage else b""

    def answer(self, choices: Sequence[dict[str, Any]], made: int) -> dict[str, Any]:
        """The whole, not streamed. `made`: tokens of all outputs."""
        return self._head | {"object": self.whole, "choices": choices, "usage": self._total(made)}

    def _total(self, made: int) -> dict[str, int]:
        return counts(sum(self.asked.prompt_lens), made)

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """One output of the whole."""
        text = self.asked.echoes[index] + text if self.asked.echoes else text
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason, "stop_reason": None}


class ChatFormat(CompletionFormat):
    """`/v1/chat/completions`, for one answer."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"
    opening, closing = '"delta": {"content": ', "}"

    def open(self, index: int) -> bytes:
        """The chunk that names the speaker."""
        return self._chunk(index, '"delta": {"role": "assistant", "content": ""}', 0)

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """As in `CompletionFormat`."""
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}
