"""The pages on prefix caching and on wrong policies show what happens: commands, policies, figures, complaints."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from engine.records.run_folder import read_run
from traces.trace import read_trace

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def follow(page: str, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    tandem = Path(sys.executable).with_name("tandem")
    commands = [shlex.split(line) for line in "".join(blocks(page, "bash")).splitlines()]
    assert all(program == "tandem" for program, *_ in commands)
    return [
        subprocess.run([tandem, *args], cwd=folder, capture_output=True, text=True, check=False)
        for _, *args in commands
    ]


def test_the_page_on_prefix_caching_shows_the_figures_that_its_commands_give(tmp_path):
    assert [done.returncode for done in follow("prefix-caching.md", tmp_path)] == [0, 0, 0]
    summaries = [read_run(tmp_path / name).summary for name in ("plain", "cached")]
    rows = re.findall(
        r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|$", (DOCS / "prefix-caching.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 4
    for name, *shown in rows:
        digits = len(shown[0].partition(".")[2])
        assert shown == [f"{summary[name]:.{digits}f}" for summary in summaries]


def test_the_trace_lines_on_the_page_share_what_it_says(tmp_path):
    (lines,) = blocks("prefix-caching.md", "json")
    (tmp_path / "t.jsonl").write_text(lines)
    first, second = read_trace(tmp_path / "t.jsonl").requests
    assert first.hash_ids[:2] == second.hash_ids[:2] and first.hash_ids[2] != second.hash_ids[2]
    assert 2 * first.hash_block_size == 1024


def test_the_page_on_wrong_policies_shows_what_is_said_of_them(tmp_path):
    for name, policy in zip(("grudge", "window", "lots"), blocks("integrity.md", "python"), strict=True):
        (tmp_path / f"{name}.py").write_text(policy)
    trace, *wrong = follow("integrity.md", tmp_path)
    assert [done.returncode for done in (trace, *wrong)] == [0, 2, 2, 2]
    *same, lots = (text.replace("(", f"({tmp_path}/", 1) for text in blocks("integrity.md", "text"))
    for done, shown in zip(wrong, same, strict=False):
        assert done.stderr.endswith(shown)
    told = wrong[-1].stderr.splitlines()[-1]
    assert told.startswith(lots.partition("step")[0]) and re.search(r"step \d+ differs \(prefill_tokens: \d", told)
