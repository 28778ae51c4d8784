"""Text as a server writes it, token by token. The oracle decodes prompt and output at once."""

from __future__ import annotations

from os.path import commonprefix

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import ADDED, BYTES, EXACT, KINDS, SPECIAL, text_of, tokens_of

from engine.executor.tokenizer import load_tokenizer, smollm2_path
from engine.server.detokenization import LONGEST_RUN, Detokenizer, Writer
from engine.server.tokenization import Text

COMMON = settings(max_examples=60, deadline=None)
A_TEXT = st.text(st.sampled_from("aP s\n.é日🎉▁\N{REPLACEMENT CHARACTER}\u200d"), max_size=12)
SPOKEN = st.lists(A_TEXT | st.sampled_from([ADDED, *SPECIAL, " Paris", " the  fox"]), max_size=4).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(smollm2_path())


@pytest.fixture(scope="module")
def text(tokenizer) -> Text:
    return Text(tokenizer)


def pieces_of(detokenizer: Detokenizer, prompt, output, stops=(), min_tokens: int = 0) -> tuple[list[str], Writer]:
    """What each token let out, and the rest; not what follows a stop string."""
    writer = Writer(detokenizer, prompt, stops, min_tokens)
    pieces = []
    for token in output:
        pieces.append(writer.take(token))
        if writer.stopped:
            return pieces, writer
    return [*pieces, writer.rest()], writer


def written(kind: str, prompt, output, stops=()) -> str:
    return "".join(pieces_of(text_of(kind).detokenizer, prompt, output, stops)[0])


def beyond(tokens, prompt, output) -> str:
    """The oracle. A character that the prompt ends within is the output's, where that completes it."""
    whole, before = tokens.decode([*prompt, *output]), tokens.decode(list(prompt))
    return whole[len(commonprefix((whole, before))) :]  # noqa: RUF071 - characters are what is compared


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Any tokens at all, some beyond the vocabulary; byte tokens and parts of characters among them."""
    size = tokens_of(kind).get_vocab_size()
    odd = [tokens_of(kind).token_to_id(each) for each in (*SPECIAL, ADDED, "<0xE6>", "<0xFF>", "<0x0A>", "æ", "▁", "Ġ")]
    return st.lists(st.integers(0, size + 2) | st.sampled_from([each for each in odd if each is not None]), max_size=20)


@pytest.mark.parametrize("kind", KINDS)
@COMMON
@given(st.data())
def test_what_is_written_is_what_decoding_prompt_and_output_gives_beyond_the_prompt(kind, data):
    """Whatever the tokens are: an output need not be what a tokenizer would make of its text."""
    prompt, output = data.draw(ids_of(kind)), data.draw(ids_of(kind))
    assert written(kind, prompt, output) == beyond(tokens_of(kind), prompt, output)


@pytest.mark.parametrize("kind", EXACT)
@COMMON
@given(SPOKEN, SPOKEN)
@example("The capital of France is", " Paris")
@example("", "  two spaces")
@example("🎉", "🎉🎉 日本")
@example("", " ")
def test_a_text_is_written_as_it_was_read(kind, before, original):
    tokens = tokens_of(kind)
    prompt = tokens.encode(before).ids
    output = tokens.encode(before + original).ids[len(prompt) :]
    assert written(kind, prompt, output) == beyond(tokens, prompt, output)


@pytest.mark.parametrize("kind", KINDS)
@COMMON
@given(st.data())
def test_it_ends_at_the_first_token_at_which_a_stop_string_is_in_the_text(kind, data):
    tokens, prompt = tokens_of(kind), tokens_of(kind).encode(" the capital").ids
    output = data.draw(ids_of(kind))
    texts = [beyond(tokens, prompt, output[:made]) for made in range(1, len(output) + 1)]
    stops = data.draw(st.lists(st.text(st.sampled_from("aP s\n.é日"), min_size=1, max_size=3), min_size=1, max_size=3))
    pieces, writer = pieces_of(text_of(kind).detokenizer, prompt, output, stops)
    met = next((said for said in texts if any(stop in said for stop in stops)), None)
    if met is None:
        assert not writer.stopped and "".join(pieces) == (texts[-1] if texts else "")
    else:
        assert writer.stopped and len(pieces) == 1 + texts.index(met)
        assert "".join(pieces) == met[: min(met.find(stop) for stop in stops if stop in met)]


@pytest.mark.parametrize("kind", EXACT)
def test_the_space_before_the_first_word_is_written_and_found(kind):
    tokens = tokens_of(kind)
    prompt = tokens.encode("France is").ids
    output = tokens.encode("France is Paris").ids[len(prompt) :]
    assert written(kind, prompt, output) == " Paris"
    assert written(kind, prompt, output, [" Paris"]) == ""


@pytest.mark.parametrize("kind", EXACT)
def test_a_character_of_several_tokens_is_never_torn(kind):
    tokens, original = tokens_of(kind), " 語 🎉 👩‍👩‍👧 wörld ﷽"
    prompt = tokens.encode("a").ids
    pieces, _ = pieces_of(text_of(kind).detokenizer, prompt, tokens.encode("a" + original).ids[len(prompt) :])
    assert "".join(pieces) == original and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "" in pieces, "some token ended within a character"


@pytest.mark.parametrize("kind", EXACT)
def test_a_character_that_the_prompt_ends_within_is_completed_and_nothing_of_the_prompt_is_said_again(kind):
    tokens = tokens_of(kind)
    ids = tokens.encode("the 語 fox").ids
    for cut in range(1, len(ids)):
        assert written(kind, ids[:cut], ids[cut:]) == beyond(tokens, ids[:cut], ids[cut:])


def test_a_long_text_of_byte_tokens_is_not_kept_to_its_end_and_each_character_is_whole():
    kind, original = "Metaspace first", "ཀཁགངཅཆཇཉཏཐདན" * 20
    tokens = tokens_of(kind)
    ids = tokens.encode(original, add_special_tokens=False).ids
    pieces, _ = pieces_of(text_of(kind).detokenizer, ids, ids[1:])  # the first is the space before all text
    assert "".join(pieces) == original
    waits = [bool(piece) for piece in pieces]
    assert waits.index(True) <= LONGEST_RUN + 3


def test_a_newline_in_a_byte_token_stops_at_once():
    kind = "Metaspace first"
    newline = tokens_of(kind).token_to_id(BYTES[10])
    fox = tokens_of(kind).encode("fox").ids
    pieces, writer = pieces_of(text_of(kind).detokenizer, fox, [*fox[1:], newline, *fox], ["\n"])
    assert writer.stopped and len(pieces) == len(fox)


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_stops_where_its_text_is_a_stop_string_and_an_added_one_where_it_is_text(kind):
    tokens = tokens_of(kind)
    fox = tokens.encode("fox").ids
    for stop in (SPECIAL[2], ADDED):
        output = [*fox[1:], tokens.token_to_id(stop), *fox[1:]]
        assert written(kind, fox, output, [stop]).rstrip() == beyond(tokens, fox, fox[1:])


def test_before_min_tokens_no_stop_string_counts(text):
    tokens = text.tokens.encode(" a b c a b").ids
    pieces, writer = pieces_of(text.detokenizer, [], tokens, [" b"], min_tokens=3)
    assert "".join(pieces) == " a b c a" and writer.stopped


@COMMON
@given(st.lists(st.integers(0, 49160), max_size=30), st.lists(st.integers(0, 49160), max_size=30))
def test_smollm2s_text_is_what_its_tokenizer_decodes(text, prompt, output):
    assert "".join(pieces_of(text.detokenizer, prompt, output)[0]) == beyond(text.tokens, prompt, output)


def test_smollm2s_conversations_are_written_as_transformers_writes_them(tokenizer, text):
    messages = [{"role": role, "content": "Hi 日本"} for role in ("system", "user", "assistant", "user")]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert text.encode(text.chat.render(messages, {}, add_generation_prompt=True), False) == expected


def test_the_filler_is_read_as_as_many_tokens_as_it_was_written_from(text):
    tokens = (text.filler() * 20)[:137]
    assert text.tokens.encode(text.tokens.decode(tokens), add_special_tokens=False).ids == tokens
