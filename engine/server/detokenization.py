"""An output's text, from its tokens as they come: it is what decoding prompt and output gives beyond the prompt.

The library decodes whole sequences. Most tokens add the same text wherever they stand after other text, which is
decoded once for each. Parts of characters and byte tokens depend on their neighbours, and are decoded together.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # stands for bytes that are no character, or not yet
LONGEST_RUN = 64  # byte tokens whose text may wait for an invalid one
_CHARACTER_BYTES = 4
_FEW = 8


class Detokenizer:
    """A tokenizer's way from tokens to text, for all outputs of a server.

    Attributes:
        pieces: the text of a token after other text: "" if it is skipped, None if that depends on its neighbours.
        anchor: ids of some text, after which tokens are decoded.
        special: the ids of special tokens, by their text.
    """

    def __init__(self, tokens: Tokenizer) -> None:
        self._tokens = tokens
        vocabulary = tokens.get_vocab()
        added = tokens.get_added_tokens_decoder()
        self.special = {token.content: number for number, token in added.items() if token.special}
        in_bytes = "ByteFallback" in repr(tokens.decoder)
        self._bytes = {number: _byte(token) for token, number in vocabulary.items() if in_bytes and _byte(token) >= 0}
        self.anchor = self._find_anchor(sorted(vocabulary.values()))
        self._anchor_len = len(tokens.decode(self.anchor))
        self.pieces: dict[int, str | None] = _Pieces(self)

    def text(self, before: list[int], run: list[int]) -> str:
        """What a run of tokens adds to the text `before` it, which is the anchor or nothing."""
        return str(self._tokens.decode(before + run))[self._anchor_len if before else 0 :]

    def piece(self, token: int) -> str | None:
        """As in `pieces`."""
        text = self.text(self.anchor, [token])
        return None if token in self._bytes or REPLACEMENT in text else text

    def context(self, prompt: Sequence[int]) -> tuple[list[int], list[int]]:
        """The text before an output, as the anchor or nothing, and the tokens at its end that may depend on it."""
        if not any(self._tokens.decode(list(end)) for end in (prompt[-_FEW:], prompt)):
            return [], list(prompt)
        run: list[int] = []
        for token in reversed(prompt[-LONGEST_RUN:]):
            if self.pieces[token]:
                break
            run.append(token)
        run.reverse()
        while len(run) == LONGEST_RUN and 0x80 <= self._bytes.get(run[0], 0) < 0xC0:  # the rest of a character
            del run[0]
        return self.anchor, run

    def waits(self, run: list[int], text: str) -> bool:
        """Whether a run's text may become another with the next token, and is worth waiting for."""
        broken = text.endswith(REPLACEMENT)
        unsure = broken or not text or run[-1] in self._bytes
        return unsure and len(run) < LONGEST_RUN + _CHARACTER_BYTES * broken

    def _find_anchor(self, numbers: list[int]) -> list[int]:
        for number in numbers:
            text = self._tokens.decode([number])
            if text.strip() and REPLACEMENT not in text and number not in self._bytes:
                return [number]
        return []


class _Pieces(dict[int, str | None]):
    """Finds a token's text when it is first asked for."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer

    def __missing__(self, token: int) -> str | None:
        piece = self[token] = self._detokenizer.piece(token)
        return piece


class Writer:
    """One output's text, from its tokens: never half a character, and nothing that a stop string may begin with.

    Attributes:
        stopped: whether a stop string was met; the text ends before it.
    """

    __slots__ = (
        "_before",
        "_beginnings",
        "_detokenizer",
        "_held",
        "_longest",
        "_maybe",
        "_min_tokens",
        "_pieces",
        "_run",
        "_said",
        "_stop_tokens",
        "_stops",
        "_waits",
        "stopped",
    )

    def __init__(
        self, detokenizer: Detokenizer, prompt: Sequence[int] = (), stops: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        """`stops`: texts, or special tokens by their text. `min_tokens`: tokens before which none of them counts."""
        self._detokenizer = detokenizer
        self._pieces = detokenizer.pieces
        self._before, self._run = detokenizer.context(prompt)
        self._said = detokenizer.text(self._before, self._run)  # of the run's text, the prompt's
        self._waits = bool(self._run or not self._before)
        self._maybe = ""  # the run's text, should no token follow
        self._held = ""  # may be the beginning of a stop string
        self._stops = stops
        self._beginnings = {stop[:size] for stop in stops for size in range(1, len(stop))}
        self._longest = max(map(len, stops), default=0)
        self._stop_tokens = {detokenizer.special[stop] for stop in stops if stop in detokenizer.special}
        self._min_tokens = min_tokens
        self.stopped = False

    def take(self, token: int) -> str:
        """The text that a token lets out."""
        text = self._pieces[token]
        if self._waits or text is None:
            text = self._join(token) if text != "" else ""
        if not self._stops:
            return text
        self._min_tokens -= 1
        if token in self._stop_tokens and self._min_tokens <= 0:
            self.stopped = True
            return self._flush(text)
        return self._beyond_stops(text) if text or self._maybe else ""

    def rest(self) -> str:
        """The text that was held back, now that no token follows."""
        return "" if self.stopped else self._flush("")

    def _join(self, token: int) -> str:
        """Add a token to the run. Returns the run's text once it depends on no further token."""
        self._run.append(token)
        text = self._detokenizer.text(self._before, self._run)
        self._waits = self._detokenizer.waits(self._run, text)
        if self._said:
            text = self._beyond_prompt(text)
        if self._waits:
            self._maybe = "" if text.endswith(REPLACEMENT) else text
            return ""
        self._before, self._run, self._said, self._maybe = self._detokenizer.anchor, [], "", ""
        return text

    def _flush(self, text: str) -> str:
        text = self._held + text + self._beyond_prompt(self._detokenizer.text(self._before, self._run))
        self._held, self._run, self._said = "", [], ""
        return text

    def _beyond_prompt(self, text: str) -> str:
        """What a run's text has beyond the prompt's part of it, of which the last character may have become another."""
        differs = (place for place, pair in enumerate(zip(self._said, text, strict=False)) if pair[0] != pair[1])
        return text[next(differs, len(self._said)) :]

    def _beyond_stops(self, text: str) -> str:
        sure = self._held + text
        seen = sure + self._maybe
        if self._min_tokens > 0:
            self._held = ""
            return sure
        met = [place for place in map(seen.find, self._stops) if place >= 0]
        if met:
            self.stopped = True
            return seen[: min(met)]
        open_at = self._open_at(sure)
        if self._maybe:
            open_at = min(open_at, self._open_at(seen))
        self._held = sure[open_at:]
        return sure[:open_at]

    def _open_at(self, text: str) -> int:
        """Where in a text a stop string may have begun."""
        first = max(len(text) - self._longest, 0)
        return next((place for place in range(first, len(text)) if text[place:] in self._beginnings), len(text))


def _byte(token: str) -> int:
    """The byte that a byte token such as `<0x0A>` stands for; -1 for any other token."""
    try:
        return int(token[3:5], 16) if len(token) == 6 and token[:3] == "<0x" and token[5] == ">" else -1
    except ValueError:
        return -1
