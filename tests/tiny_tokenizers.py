"""Tokenizers of every kind that serves, trained on a few words, each with an added token and special ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from engine.server.tokenization import Text

WORDS = ["the capital of France is Paris, the  quick brown fox\n\njumps over the lazy dog. héllo 日本"] * 3
SPECIAL = ["<s>", "</s>", "<|end|>"]
ADDED = "<tool>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _finished(tokens: Tokenizer) -> Tokenizer:
    tokens.add_special_tokens(SPECIAL)
    tokens.add_tokens([AddedToken(ADDED, normalized=False)])
    begin = ("<s>", tokens.token_to_id("<s>"))
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    return tokens


def byte_level() -> Tokenizer:
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokens.train_from_iterator(WORDS, trainer)
    return _finished(tokens)


def split_byte_level() -> Tokenizer:
    """As LLaMA 3's: a pattern splits, and bytes follow."""
    tokens = byte_level()
    pattern = Regex(r" ?\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), bytes_])
    return tokens


def _sentencepiece(strip: bool) -> Tokenizer:
    """A BPE with byte tokens, which are no added tokens."""
    tokens = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    special = ["<unk>", *SPECIAL, *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    tokens.train_from_iterator([text.replace("日本", "") for text in WORDS], trainer)
    plain = json.loads(tokens.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] not in BYTES]
    tokens = Tokenizer.from_str(json.dumps(plain))
    ends = [decoders.Strip(" ", 1, 0)] if strip else []
    joined = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    tokens.decoder = decoders.Sequence(joined)
    return _finished(tokens)


def metaspace(prepend: str) -> Tokenizer:
    tokens = _sentencepiece(strip=prepend != "never")
    tokens.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    return tokens


def prepending_normalizer() -> Tokenizer:
    """As in LLaMA 2's own file."""
    tokens = _sentencepiece(strip=True)
    tokens.pre_tokenizer = None
    tokens.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokens


def unigram() -> Tokenizer:
    """As of T5 or ALBERT, whose decoder is Metaspace's."""
    tokens = Tokenizer(models.Unigram())
    tokens.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokens.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokens.train_from_iterator(WORDS, trainer)
    return _finished(tokens)


def word_piece() -> Tokenizer:
    tokens = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokens.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]"], show_progress=False)
    tokens.train_from_iterator(WORDS, trainer)
    return _finished(tokens)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, split by a pattern": split_byte_level,
    "Metaspace first": lambda: metaspace("first"),
    "Metaspace always": lambda: metaspace("always"),
    "Metaspace never": lambda: metaspace("never"),
    "Prepend and Replace": prepending_normalizer,
    "Unigram": unigram,
    "WordPiece": word_piece,
}
EXACT = [kind for kind in KINDS if kind not in ("Unigram", "WordPiece")]  # any text is what its tokens decode to


@cache
def tokens_of(kind: str) -> Tokenizer:
    return KINDS[kind]()


@cache
def text_of(kind: str) -> Text:
    return Text(fast(tokens_of(kind)))


def fast(tokens: Tokenizer, **options: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", **options)
