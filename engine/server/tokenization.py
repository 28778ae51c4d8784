"""Prompts to token ids: text, and conversations by way of the model's chat template. Runs in the API process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from engine.server.chat_template import ChatTemplate
from engine.server.detokenization import Detokenizer

FILLER = " The quick brown fox jumps over the lazy dog."
_MOST_IDS = 2**32  # of the tokenizers library


class Text:
    """A model's tokenizer and chat template, as a server needs them; safe to use from several threads.

    Attributes:
        tokens: the tokenizer.
        detokenizer: its way back.
        chat: writes a conversation as a text that has the tokens which the model wants at its beginning.
        longest: characters of the longest token: a text of n characters has at least n / longest tokens.
        vocab_size: token ids are below it.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a transformers fast tokenizer."""
        self.tokens: Tokenizer = tokenizer.backend_tokenizer
        self.detokenizer = Detokenizer(self.tokens)
        self.chat = ChatTemplate(tokenizer)
        vocabulary = self.tokens.get_vocab()
        self.longest = max(map(len, vocabulary))
        self.vocab_size = max(vocabulary.values()) + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """A prompt's token ids, with those that the model wants at its beginning, if they are to be added."""
        return list(self.tokens.encode(text, add_special_tokens=add_special_tokens).ids)

    def name_beyond(self, ids: Sequence[int], vocab_size: int) -> str:
        """For an error: the tokenizer's name of the largest id that a model of so many tokens lacks; "" if none."""
        largest = max(ids)
        name = self.tokens.id_to_token(largest) if vocab_size <= largest < _MOST_IDS else None
        return "" if name is None else f": the tokenizer has it as {name!r}"

    def filler(self) -> list[int]:
        """Token ids for outputs that say nothing; repeated and read again, they are as many."""
        return self.encode(FILLER, add_special_tokens=False)


def load_text(model: str) -> Text:
    """The tokenizer at a model's path, or of the model of that name. Raises TandemError if there is none."""
    from engine.executor.tokenizer import load_tokenizer, model_path

    return Text(load_tokenizer(model_path(model)))
