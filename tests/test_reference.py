"""docs/reference.md says what the code has: every limit with its default, every latency, every column of a run."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from analysis.jobs.limits import OF_CPU, OF_GPU
from analysis.jobs.options import Limits
from analysis.metrics.names import LATENCIES
from engine.config import ServingConfig
from engine.executor.cpu.machine import Cpu
from engine.executor.cuda.machine import Cuda
from engine.records.schema import COLUMNS

PAGE = (Path(__file__).parents[1] / "docs/reference.md").read_text()
OF_MEMORY_AND_MODEL = {"num_blocks": "memory", "max_model_len": "model"}
"""Limits that no machine has a number for."""


def rows(after: str) -> list[list[str]]:
    """The cells of the first table after a text, without its head."""
    table = re.search(r"(?:^\|.*\n)+", PAGE[PAGE.index(after) :], re.MULTILINE)
    assert table
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[0].strip().split("\n")[2:]]


def name_of_option(field: str) -> str:
    hint = get_type_hints(Limits, include_extras=True)[field].__metadata__[0]
    return hint.names[0].partition("/")[0] if hint.names else f"--{field.replace('_', '-')}"


def shown(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def test_every_limit_has_its_default():
    defaults = {each.name: each.default for each in fields(ServingConfig)} | OF_MEMORY_AND_MODEL
    gpu = defaults | OF_GPU | {"block_size": Cuda.default_block_size}
    cpu = defaults | OF_CPU | {"block_size": Cpu.default_block_size}
    limits = {name_of_option(each.name): each.name for each in fields(Limits) if each.name != "allow_long_context"}
    said = {row[0].strip("`"): row[2:] for row in rows("## Defaults")}
    assert said.keys() == limits.keys()
    for option, name in limits.items():
        simulated = said[option][0].removeprefix("profile, or ")
        assert said[option][1:] == [shown(gpu[name]), shown(cpu[name])], option
        assert simulated == shown(defaults[name] if name == "block_size" else gpu[name]), option


def test_every_latency_is_defined():
    assert {row[0].strip("`"): row[1:] for row in rows("## Latencies")} == {
        key: [metric.label, metric.definition] for key, metric in LATENCIES.items()
    }


@pytest.mark.parametrize("table", COLUMNS)
def test_every_column_is_there_in_order(table):
    assert [row[0].strip("`") for row in rows(f"`{table}.parquet` has a row")] == list(COLUMNS[table])


def test_the_index_lists_every_page_and_every_program():
    docs = Path(__file__).parents[1] / "docs"
    listed = re.findall(r"\| \[[^]]+\]\(([^)]+)\)", (docs / "README.md").read_text())
    there = {path.relative_to(docs).as_posix() for path in (*docs.glob("*.md"), *docs.glob("examples/*.py"))}
    assert sorted(listed) == sorted(there - {"README.md"})


def sentences(page: Path) -> list[str]:
    """A page's prose: no code, no tables, no headings; what stands in backquotes or behind a link is one word."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    lines = (line for line in text.splitlines() if not line.startswith(("|", "#")))
    words = re.sub(r"`[^`]*`", "X", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(lines)))
    return [each for each in re.split(r"(?<=[.!?])\**\s+", words) if each]


def test_sentences_are_short():
    root = Path(__file__).parents[1]
    lengths = [len(each.split()) for page in (root / "README.md", *root.glob("docs/*.md")) for each in sentences(page)]
    assert max(lengths) <= 45
    assert sum(length > 30 for length in lengths) <= 0.05 * len(lengths)
