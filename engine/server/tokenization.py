"""Text on both sides of the engine: prompts to token ids, and tokens to text as they come. Runs in the API process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

FILLER = " The quick brown fox jumps over the lazy dog."


class Text:
    """A model's tokenizer and chat template, as a server needs them; safe to use from several threads.

    Attributes:
        longest: characters of the longest token: a text of n characters has at least n / longest tokens.
        vocab_size: token ids are below it.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a transformers fast tokenizer."""
        self.tokens: Tokenizer = tokenizer.backend_tokenizer
        vocabulary = self.tokens.get_vocab()
        self.longest = max(map(len, vocabulary))
        self.vocab_size = max(vocabulary.values()) + 1
        self._tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """A prompt's token ids, with those that the model wants at its beginning: a text from `chat` has them."""
        return list(self.tokens.encode(text, add_special_tokens=add_special_tokens).ids)

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation as the model was taught to read it. Raises ValueError if it cannot be written so."""
        if not self._tokenizer.chat_template:
            raise ValueError("this model has no chat template: use /v1/completions")
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program, and fails as programs do
            raise ValueError(f"the chat template refuses these messages: {error}") from None

    def filler(self) -> list[int]:
        """Token ids for outputs that say nothing; repeated and read again, they are as many."""
        return self.encode(FILLER, add_special_tokens=False)


def load_text(model: str) -> Text:
    """The tokenizer at a model's path, or of the model of that name. Raises TandemError if there is none."""
    from engine.executor.tokenizer import load_tokenizer, model_path

    return Text(load_tokenizer(model_path(model)))


class Writer:
    """One output's text, from its tokens: never half a character, and nothing that a stop string may begin with.

    Attributes:
        stopped: whether a stop string was met; the text ends before it.
    """

    __slots__ = ("_held", "_min_tokens", "_stops", "_stream", "_tokens", "_undecoded", "stopped")

    def __init__(self, tokens: Tokenizer, stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        """`min_tokens`: tokens before which no stop string counts."""
        self._tokens = tokens
        self._stream = DecodeStream(skip_special_tokens=True)
        self._undecoded: list[int] = []  # tokens whose characters are not complete
        self._stops = stops
        self._min_tokens = min_tokens
        self._held = ""
        self.stopped = False

    def take(self, token: int) -> str:
        """The text that a token lets out."""
        text = self._decode(token)
        if not self._stops:
            return text
        self._min_tokens -= 1
        return self._beyond_stops(text)

    def rest(self) -> str:
        """The text that was held back, now that no token follows."""
        text = self._held
        if self._undecoded and not self.stopped:
            text += str(self._tokens.decode(self._undecoded))
        self._held, self._undecoded = "", []
        return text

    def _decode(self, token: int) -> str:
        try:
            text = self._stream.step(self._tokens, token)
        except Exception:  # bytes that are no text confuse it: begin anew with the tokens that it has not decoded
            self._stream = DecodeStream(skip_special_tokens=True)
            lost, self._undecoded = [*self._undecoded, token], []
            return str(self._tokens.decode(lost))
        if text is None:
            self._undecoded.append(token)
            return ""
        self._undecoded.clear()
        return str(text)

    def _beyond_stops(self, text: str) -> str:
        seen = self._held + text
        if self._min_tokens > 0:
            self._held = ""
            return seen
        met = [place for place in map(seen.find, self._stops) if place >= 0]
        if met:
            self.stopped, self._held = True, ""
            return seen[: min(met)]
        hold = max(_overlap(seen, stop) for stop in self._stops)
        self._held = seen[len(seen) - hold :]
        return seen[: len(seen) - hold]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop string may begin."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
