"""Text as a server writes it: token by token, and the same as if it were decoded at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.server.tokenization import Text, Writer, load_text


@pytest.fixture(scope="module")
def text() -> Text:
    return load_text("smollm2")


def written(text: Text, tokens: list[int], stops=(), min_tokens: int = 0) -> tuple[list[str], Writer]:
    writer = Writer(text.tokens, stops, min_tokens)
    pieces = []
    for token in tokens:
        pieces.append(writer.take(token))
        if writer.stopped:
            return pieces, writer
    return [*pieces, writer.rest()], writer


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1))
def test_what_is_written_token_by_token_is_the_text(text, original):
    tokens = text.tokens.encode(original, add_special_tokens=False).ids
    pieces, _ = written(text, tokens)
    assert "".join(pieces) == text.tokens.decode(tokens)


def test_a_character_of_several_tokens_is_never_torn(text):
    original = "日本語 🎉 👩‍👩‍👧 wörld ﷽"
    pieces, _ = written(text, text.tokens.encode(original).ids)
    assert "".join(pieces) == original and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "" in pieces, "some token ended within a character"


def test_an_output_that_ends_within_a_character_says_so(text):
    tokens = text.tokens.encode("日").ids
    assert len(tokens) > 1
    assert "".join(written(text, tokens[:1])[0]) == text.tokens.decode(tokens[:1])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=30))
def test_any_tokens_are_written(text, tokens):
    written(text, tokens)


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab ", min_size=1, max_size=30), st.lists(st.text("ab ", min_size=1, max_size=5), min_size=1, max_size=3)
)
def test_text_ends_before_the_first_stop_string_and_nothing_of_it_is_let_out(text, original, stops):
    tokens = text.tokens.encode(original, add_special_tokens=False).ids
    pieces, writer = written(text, tokens, stops)
    met = [place for place in map(original.find, stops) if place >= 0]
    said = "".join(pieces)
    assert writer.stopped == bool(met)
    if met:  # with a token comes more than a character: a later stop string may be seen first, never an earlier missed
        assert original.startswith(said) and not any(stop in said for stop in stops)
    else:
        assert said == original


def test_before_min_tokens_no_stop_string_counts(text):
    tokens = text.tokens.encode(" a b c a b").ids
    pieces, writer = written(text, tokens, [" b"], min_tokens=3)
    assert "".join(pieces) == " a b c a" and writer.stopped


def test_the_filler_is_read_as_as_many_tokens_as_it_was_written_from(text):
    tokens = (text.filler() * 20)[:137]
    assert text.tokens.encode(text.tokens.decode(tokens), add_special_tokens=False).ids == tokens
