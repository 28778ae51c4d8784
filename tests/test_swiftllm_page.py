"""What docs/swiftllm.md says is what happens: its command runs, its points come out again, its sample is as it says.

The command runs on 2 s of arrivals at each rate instead of 1,000; some points are simulated in full.
"""

from __future__ import annotations

import random
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reader import ROOT, blocks

from traces.trace import read_trace

PAGE = ROOT / "docs/swiftllm.md"
sys.path.append(str(ROOT / "docs/examples"))

import sharegpt_turns  # noqa: E402
import swiftllm  # noqa: E402


def lines(text: str) -> list[list[str]]:
    """Words, line by line; rules, which are as wide as what is above them, are left out."""
    return [line.split() for line in text.splitlines() if line.strip(" ─")]


@pytest.fixture(scope="module")
def shown() -> list[list[str]]:
    (text,) = blocks(PAGE, "text")
    return lines(text)


def test_its_command_draws_the_figure_and_prints_the_tables_it_shows(tmp_path, shown):
    (command,) = blocks(PAGE, "bash")
    program, script, folder = shlex.split(command)
    assert (program, folder) == ("python", "FIGURES")
    short = ["--seconds", "2", "--seeds", "1"]
    command_line = [sys.executable, script, str(tmp_path), *short]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "swiftllm.png").read_bytes().startswith(b"\x89PNG")
    printed = lines(done.stdout)
    assert len(printed) == len(shown)
    assert [line for line in printed if not is_point(line)] == [line for line in shown if not is_point(line)]


def is_point(line: list[str]) -> bool:
    """Whether a line has what depends on the simulated seconds."""
    return line[0].replace(".", "").isdigit() or " ".join(line[:-6]) in swiftllm.OTHERWISE


@pytest.mark.parametrize(("gpu", "rate"), [("A100", 1.0), ("RTX 4090", 4.0)])
def test_the_points_it_shows_are_those_of_the_full_experiment(gpu, rate, shown):
    runs = {each: [] for each in swiftllm.published(gpu, "swiftllm")}
    runs |= {each: [dict.fromkeys(swiftllm.METRICS, 0.0)] for each in runs}
    runs[rate] = [swiftllm.SAME.serve(gpu, rate, seed) for seed in range(3)]
    row = next(row for row in swiftllm.closeness(gpu, runs).rows if float(row[0]) == rate)
    assert list(row) in shown


def test_it_names_the_kv_blocks_that_were_given():
    given_blocks = [swiftllm.SAME.config(swiftllm.SAME.profile(gpu)).num_blocks for gpu in swiftllm.PROFILES]
    assert "| KV blocks | {:,} and {:,} |".format(*given_blocks) in PAGE.read_text()


@pytest.mark.parametrize("gpu", swiftllm.PROFILES)
def test_the_published_ratio_at_low_load_tells_how_prompts_were_sampled(gpu):
    lowest = swiftllm.published(gpu, "swiftllm")[1.0]
    published = lowest["per_token"] / lowest["per_output_token"]
    shares = {}
    for name in ("sharegpt-turns", "sharegpt-lengths"):
        requests = read_trace(name).requests
        shares[name] = np.mean([each.output_len / (each.prompt_len + each.output_len) for each in requests])
    assert shares["sharegpt-turns"] == pytest.approx(published, abs=0.03)
    assert shares["sharegpt-lengths"] > 1.8 * published


def test_the_lengths_are_those_it_states_and_say_how_they_were_made():
    trace = read_trace("sharegpt-turns")
    means = [np.mean([getattr(each, name) for each in trace.requests]) for name in ("prompt_len", "output_len")]
    assert "{:.0f} and {:.0f} tokens".format(*means) in PAGE.read_text()
    assert "llama-models" in trace.meta["tokenizer"] and trace.meta["pairs"] == 13322


@given(turns=st.lists(st.text("ab", min_size=1), min_size=2, max_size=9), seed=st.integers(0, 99))
def test_a_prompt_is_every_turn_before_the_one_that_is_its_output(turns, seed):
    prompt, output = sharegpt_turns.cut(turns, random.Random(seed))
    before = prompt.split("\n")
    assert before == turns[: len(before)] and output == turns[len(before)]


def test_short_conversations_and_pairs_and_long_outputs_are_left_out():
    kept = [["a" * 5, "b" * 6, "c" * 7]]
    left_out = [["a" * 5, "b" * 6], ["a", "b", "c"], ["a" * 5, "b" * 1000, "c" * 1000]]
    (pair,) = sharegpt_turns.sampled(left_out + kept, len, random.Random(0))
    assert pair in [(5, 6), (12, 7)]


def test_the_first_requests_come_again_where_a_trace_is_too_short():
    trace = swiftllm.Experiment(lengths="sharegpt-lengths", seconds=5000).trace(1, seed=0)
    assert len(trace.requests) == 5000
    assert trace.requests[4000].prompt_len == trace.requests[0].prompt_len


def test_every_figure_is_shown_on_a_page():
    shown_somewhere = {
        name for page in (ROOT / "docs").glob("*.md") for name in re.findall(r"\]\(figures/(.*?)\)", page.read_text())
    }
    assert shown_somewhere == {path.name for path in (ROOT / "docs/figures").iterdir()}
