"""Tokenizers as they are published. The oracle is transformers' AutoTokenizer, or SentencePiece for its own files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, SPECIAL, WORDS, byte_level, fast, prepending_normalizer, tokens_of
from transformers import AutoTokenizer, LlamaConfig

from engine.executor.tokenizer import load_tokenizer
from engine.server.detokenization import Writer
from engine.server.tokenization import Text
from traces.errors import TandemError

LONG = "the quick brown fox jumps over the lazy dog. " * 20
TRUNCATION = {"max_length": 16, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
PADDING = {"strategy": {"Fixed": 512}, "direction": "Left", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
TEXTS = ["the fox", "  two  spaces ", "日 🎉\n\n", "<s>the<|end|> fox</s>", "", "<tool>x <tool> y"]


def folder_of(path: Path, **files: object) -> Path:
    """A model's folder, with JSON files by name."""
    LlamaConfig().save_pretrained(path)
    for name, content in files.items():
        written = content if isinstance(content, str) else json.dumps(content)
        (path / name.replace("__", ".")).write_text(written, encoding="utf-8")
    return path


def json_of(tokens) -> dict[str, object]:
    return json.loads(tokens.to_str())


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_json_that_cuts_or_pads_does_neither_here(kind, tmp_path):
    cutting = json_of(tokens_of(kind)) | {"truncation": TRUNCATION, "padding": PADDING}
    text = Text(load_tokenizer(folder_of(tmp_path, tokenizer__json=cutting)))
    assert text.encode(LONG) == tokens_of(kind).encode(LONG).ids
    assert text.encode("fox") == tokens_of(kind).encode("fox").ids


DECLARED: dict[str, dict[str, object]] = {
    "nothing": {},
    "a fast tokenizer": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "LLaMA's": {"tokenizer_class": "LlamaTokenizer", "legacy": False},
    "LLaMA's, legacy": {"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
    "no BOS": {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False},
    "BOS and EOS": {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": True},
}


@pytest.mark.parametrize("declared", DECLARED.values(), ids=list(DECLARED))
@pytest.mark.parametrize("make", [byte_level, prepending_normalizer])
def test_prompts_are_read_as_transformers_reads_them(make, declared, tmp_path):
    config = declared | {"bos_token": "<s>", "eos_token": "</s>"}
    folder = folder_of(tmp_path, tokenizer__json=json_of(make()), tokenizer_config__json=config)
    text, theirs = Text(load_tokenizer(folder)), AutoTokenizer.from_pretrained(folder)
    for said in TEXTS:
        for special in (True, False):
            assert text.encode(said, special) == theirs(said, add_special_tokens=special).input_ids


GOOD = json_of(byte_level())
REMOTE = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
UNREADABLE: dict[str, dict[str, object]] = {
    "no tokenizer": {},
    "an empty file": {"tokenizer__json": ""},
    "a list": {"tokenizer__json": []},
    "half a file": {"tokenizer__json": json.dumps(GOOD)[:400]},
    "no model": {"tokenizer__json": GOOD | {"model": None}},
    "a part that is unknown": {"tokenizer__json": GOOD | {"pre_tokenizer": {"type": "Mine"}}},
    "what makes the library panic": {
        "tokenizer__json": GOOD | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    },
    "a config that is no JSON": {"tokenizer__json": GOOD, "tokenizer_config__json": "{"},
    "a class without a fast form": {"tokenizer_config__json": {"tokenizer_class": "BertJapaneseTokenizer"}},
    "a program": {"tokenizer_config__json": REMOTE},
    "a program beside a file": {"tokenizer__json": GOOD, "tokenizer_config__json": REMOTE},
}


@pytest.mark.parametrize("files", UNREADABLE.values(), ids=list(UNREADABLE))
def test_an_unreadable_tokenizer_is_one_line_and_no_code_of_its_is_run_or_offered(files, tmp_path):
    folder = folder_of(tmp_path, **files)
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(TandemError) as raised:
        load_tokenizer(folder)
    said = str(raised.value)
    assert said.startswith(f"{folder}: no readable tokenizer (") and said.endswith(")") and "\n" not in said
    assert "trust_remote_code" not in said and not said.endswith(": )")
    assert not (tmp_path / "ran").exists()


# -- tokenizer.model ---------------------------------------------------------------------------------------


def sentencepiece_folder(path: Path, **options: object) -> Path:
    import sentencepiece

    LlamaConfig().save_pretrained(path)
    with (path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*WORDS, *WORDS[0].split()]),
            model_writer=file,
            byte_fallback=True,
            hard_vocab_limit=False,
            vocab_size=320,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
            **options,
        )
    return path


PUBLISHED = {
    "BPE, as LLaMA's": {"model_type": "bpe"},
    "BPE with symbols": {"model_type": "bpe", "user_defined_symbols": ["<|end|>"]},
    "Unigram": {"model_type": "unigram"},
    "BPE without a prefix": {"model_type": "bpe", "add_dummy_prefix": False},
}


@pytest.mark.parametrize("options", PUBLISHED.values(), ids=list(PUBLISHED))
def test_a_tokenizer_model_alone_is_read_as_sentencepiece_reads_it(options, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = Text(load_tokenizer(sentencepiece_folder(tmp_path, **options)))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    begins = [] if text.encode("")[:1] != [oracle.bos_id()] else [oracle.bos_id()]

    @settings(max_examples=60, deadline=None)
    @given(st.text("ab Ptheo s\n日🎉", max_size=20), st.text("ab Ptheo s\n日🎉", max_size=20))
    def same(before: str, original: str) -> None:
        prompt, ids = text.encode(before), text.encode(before + original)
        assert ids == begins + oracle.encode(before + original)
        output = ids[len(prompt) :]
        writer = Writer(text.detokenizer, prompt)
        said = "".join([*map(writer.take, output), writer.rest()])
        whole, head = oracle.decode([*prompt, *output]), oracle.decode(prompt)
        assert not whole.startswith(head) or said == whole[len(head) :]

    same()


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x0a\x05abcde", b"IQ== 0\nIg== 1\n"])
def test_a_tokenizer_model_of_another_format_is_one_line(content, tmp_path):
    pytest.importorskip("sentencepiece")
    folder = folder_of(tmp_path)
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(TandemError, match=r"tokenizer\.model") as raised:
        load_tokenizer(folder)
    assert "\n" not in str(raised.value)


def test_without_sentencepiece_the_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    folder = folder_of(tmp_path)
    (folder / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(TandemError, match=r"needs sentencepiece.*: pip install 'tandem-llm\[engine\]'"):
        load_tokenizer(folder)


def test_tokens_that_the_model_lacks_are_named():
    text = Text(fast(byte_level()))
    size = text.tokens.token_to_id(SPECIAL[0])
    assert text.name_beyond(text.encode("the fox", add_special_tokens=False), size) == ""
    assert "'<tool>'" in text.name_beyond(text.encode("the <tool> fox"), size)
