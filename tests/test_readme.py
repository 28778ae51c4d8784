"""What the README shows is what happens: its commands run in order, its scheduler is the one they use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from reader import ROOT, blocks, follow

from engine.records.run_folder import read_run
from traces.trace import read_trace

README = ROOT / "README.md"


@pytest.fixture(scope="module")
def followed(tmp_path_factory, measured) -> Path:
    """A folder in which a reader has followed the README: saved its scheduler, run its tandem commands."""
    folder = tmp_path_factory.mktemp("reader")
    (scheduler,) = blocks(README, "python")
    (folder / "shortest_first.py").write_text(scheduler)
    follow(README, folder, measured)
    return folder


def test_the_commands_leave_the_runs_that_the_text_speaks_of(followed):
    for name, scheduler in (("sjf", "shortest_first:ShortestFirst"), ("sarathi", "chunked_prefill")):
        run = read_run(followed / name)
        assert run.manifest["system"]["scheduler"] == scheduler
        assert run.summary["completed"] == 1000
    assert (followed / "comparison/report.html").exists()


def test_shortest_first_serves_short_requests_sooner(followed):
    mean = {name: read_run(followed / name).summary["mean_normalized_latency_ms"] for name in ("sjf", "sarathi")}
    assert mean["sjf"] < 0.8 * mean["sarathi"]


def test_the_trace_lines_are_a_trace(tmp_path):
    (lines,) = blocks(README, "json")
    (tmp_path / "t.jsonl").write_text(lines)
    first, second = read_trace(tmp_path / "t.jsonl").requests
    assert (first.prompt_len, first.output_len, first.max_tokens) == (128, 40, 40)
    assert (second.prompt_len, second.output_len, second.max_tokens) == (4, 200, 512)


def test_its_make_targets_exist_and_ci_runs_the_test_command():
    targets = re.findall(r"^make (\w+)$", "".join(blocks(README, "bash")), re.MULTILINE)
    assert targets == ["validate", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_every_file_it_names_exists():
    named = re.findall(
        r"`((?:engine|sim|traces|analysis|docs|tests)/[\w/.]*)`|\]\((docs/[\w./]+)\)", README.read_text()
    )
    assert named and all((ROOT / (code or link)).exists() for code, link in named)
