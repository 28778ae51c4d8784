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
def followed(tmp_path_factory, measured: Path) -> tuple[Path, dict[str, str]]:
    """A folder in which a reader has followed the README, and what each command printed."""
    folder = tmp_path_factory.mktemp("reader")
    (scheduler,) = blocks(README, "python")
    (folder / "shortest_first.py").write_text(scheduler)
    return folder, follow(README, folder, measured)


def test_the_commands_leave_what_the_text_speaks_of(followed):
    folder, _ = followed
    for name, scheduler in (
        ("first", "chunked_prefill"),
        ("two/shortest_first-ShortestFirst", "shortest_first:ShortestFirst"),
    ):
        run = read_run(folder / name)
        assert run.manifest["system"]["scheduler"] == scheduler
        assert run.summary["completed"] == 4000
    assert all((folder / page).exists() for page in ("two/policies.html", "comparison/report.html"))


def test_the_tables_it_shows_are_those_that_are_printed(followed):
    _, outputs = followed
    comparison, validation = ([line.split() for line in text.splitlines()] for text in blocks(README, "text"))
    printed = [line.split() for text in outputs.values() for line in text.splitlines()]
    assert len(comparison) > 1 and all(line in printed for line in comparison[1:])  # the heading has fewer columns
    (whole,) = blocks(ROOT / "docs/validate.md", "text")
    assert validation and all(line in map(str.split, whole.splitlines()) for line in validation)


def test_shortest_first_serves_most_requests_sooner_and_some_late(followed):
    folder, _ = followed
    own, fcfs = (
        read_run(folder / "two" / name).summary for name in ("shortest_first-ShortestFirst", "chunked_prefill")
    )
    assert own["mean_ttft_ms"] < 0.5 * fcfs["mean_ttft_ms"] and own["p99_ttft_ms"] > 2 * fcfs["p99_ttft_ms"]


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


def test_its_ratios_to_vllm_are_those_of_the_performance_page():
    row = r"^\| \d+ x (\d+) \| ([\d.,]+) \| ([\d.,]+) \| [^|]+ \| [\d.]+ \| ([\d.,]+) \| ([\d.,]+) \| [\d.]+ \|$"
    found = re.findall(row, (ROOT / "docs/performance.md").read_text(), re.MULTILINE)
    forwards = [
        [float(cell.replace(",", "")) for cell in each] for each in found
    ]  # tokens, prefill, vLLM's, decode, ...
    ratios = {
        "decode step": [ours / theirs for *_, ours, theirs in forwards],
        "prefill to 8k": [ours / theirs for length, ours, theirs, *_ in forwards if length <= 8192],
        "prefill of 16k to 64k": [ours / theirs for length, ours, theirs, *_ in forwards if length > 8192],
    }
    assert len(forwards) == 20
    for name, each in ratios.items():
        assert re.search(rf"time of a {name}.*\| {min(each):.2f} to {max(each):.2f} \|", README.read_text()), name
