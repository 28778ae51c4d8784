"""Tables on a console: every word and number of them is there, however narrow it is; in a file they are whole."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from analysis.cli.main import app
from analysis.report.policy_list import list_policies
from analysis.report.tables import TextTable, print_tables
from engine.records.run_folder import read_run
from engine.scheduler import POLICIES
from engine.scheduler.registry import parameters

STYLE = re.compile(r"\x1b\[[\d;]*m")
PROFILE = "a100-80gb/llama-3-8b"
WORDS = st.lists(st.text("abc-:=/,", min_size=1, max_size=20), min_size=1, max_size=4).map(" ".join)
NUMBERS = st.sampled_from(["1,234", "0.12", "-1.5%", "1.1% / 18.5%*", "–", "12,345,678"])


@st.composite
def text_tables(draw: st.DrawFn) -> TextTable:
    labels, numbers = draw(st.integers(1, 3)), draw(st.integers(0, 8))
    columns = [*draw(st.lists(WORDS, min_size=labels, max_size=labels))]
    columns += draw(st.lists(st.one_of(WORDS, st.just("")), min_size=numbers, max_size=numbers))
    row = st.tuples(*[WORDS] * labels, *[NUMBERS] * numbers)
    return TextTable("Title", "", columns, draw(st.lists(row, min_size=1, max_size=3)), labels)


def printed(table: TextTable, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_tables([table], console)
    return console.file.getvalue()


@given(text_tables(), st.integers(10, 200))
def test_no_word_and_no_number_is_cut_and_a_number_stands_on_one_line(table, width):
    shown = printed(table, width)
    cells = [cell for row in (table.columns, *table.rows) for cell in row]
    assert {word for cell in cells for word in cell.split()} <= {*shown.split()}
    assert all(number in shown for row in table.rows for number in row[table.labels :])


@given(text_tables())
def test_a_table_that_has_room_has_a_line_for_each_row(table):
    lines = printed(table, 10_000).splitlines()
    assert len(lines) == 5 + len(table.rows)  # title, empty, heading, rule, rows, empty
    for line, row in zip(lines[4:], table.rows, strict=False):
        assert line.split() == " ".join(row).split()


def test_columns_that_find_no_room_stand_below_with_their_labels():
    rows = [("a policy", *("1,234", "+1.0%") * 4)]
    shown = printed(TextTable("Latency", "", ("", "mean", "", "p50", "", "p90", "", "p99", ""), rows), 40)
    assert [line.split() for line in shown.splitlines()[2:] if line.strip("─ ")] == [
        ["mean", "p50"],
        ["a", "policy", "1,234", "+1.0%", "1,234", "+1.0%"],
        ["p90", "p99"],
        ["a", "policy", "1,234", "+1.0%", "1,234", "+1.0%"],
    ]


# -- the commands that print tables ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with traces, simulated runs of two policies, and copies of them that stand for real ones."""
    folder = tmp_path_factory.mktemp("tables")
    trace = ("trace", "synthetic", "--rate", 20, "--prompt", "fixed:90", "--requests")
    tandem(*trace, 40, "--output", "uniform:2:30", "-o", folder / "t.parquet")
    tandem(*trace, 3, "--output", "fixed:1", "-o", folder / "single.parquet")
    for policy in ("fcfs", "prefill_first"):
        simulate = ("simulate", "-t", folder / "t.parquet", "-p", PROFILE, "--max-seqs", 4, "--scheduler", policy)
        tandem(*simulate, "-o", folder / policy)
        run = read_run(folder / policy)
        run.manifest["provenance"]["backend"] = "executor"
        late = pa.array([int(ns * 1.04) for ns in run.tables["steps"]["device_ns"].to_pylist()])
        at = run.tables["steps"].column_names.index("device_ns")
        run.tables = {**run.tables, "steps": run.tables["steps"].set_column(at, "device_ns", late)}
        run.write(folder / f"{policy}-real")
    return folder


def tandem(*args: object) -> int | None:
    return app([*map(str, args)], standalone_mode=False)


@pytest.fixture
def shown(work, monkeypatch, capsys):
    """What a command prints on a terminal of some columns; without columns, into a file."""
    monkeypatch.chdir(work)

    def show(command: str, columns: int | None) -> str:
        monkeypatch.setenv("COLUMNS", str(columns or 40))  # of no concern to a file
        monkeypatch.setattr(sys.stdout, "isatty", lambda: columns is not None)
        capsys.readouterr()
        tandem(*command.split())
        return STYLE.sub("", capsys.readouterr().out)

    return show


SIMULATE = f"simulate -p {PROFILE} -o new --overwrite"
TABLES = {
    "a trace": "trace show t.parquet",
    "a GPU's memory": "memory h200 --model llama-3-8b",
    "the profiles": "profile list",
    "the policies": "policies",
    "a run": f"{SIMULATE} -t t.parquet --prefix-caching --scheduler vtc:input_weight=1:output_weight=4",
    "a run that swaps": f"{SIMULATE} -t t.parquet --scheduler edf --kv-blocks 20 --cpu-blocks 99 --max-model-len 200",
    "outputs of one token": f"{SIMULATE} -t single.parquet",
    "rejected requests": f"{SIMULATE} -t t.parquet --max-model-len 100",
    "nothing completed": f"{SIMULATE} -t t.parquet --max-model-len 4",
    "policies side by side": f"{SIMULATE} -t t.parquet -o several --scheduler sjf --against fcfs,prefill_first",
    "two simulations": "compare fcfs prefill_first",
    "a comparison": f"compare fcfs fcfs-real -p {PROFILE} -o new --overwrite --ablate head",
    "a ranking": "compare --rank fcfs fcfs-real prefill_first prefill_first-real",
}


@pytest.mark.parametrize("command", TABLES.values(), ids=TABLES.keys())
def test_a_narrow_terminal_gets_every_word_that_a_file_gets(command, shown):
    whole = shown(command, None)
    assert "…" not in whole and not re.search(r"\b(None|nan)\b", whole)
    for columns in (60, 80):
        narrow = shown(command, columns)
        assert {*narrow.split()} == {*whole.split()} or _rules(narrow) == _rules(whole), columns


def _rules(text: str) -> set[str]:
    """The words without the rules of tables, which are as wide as these."""
    return {word for word in text.split() if word.strip("─")}


@pytest.mark.parametrize("command", TABLES.values(), ids=TABLES.keys())
def test_at_80_columns_no_line_is_longer(command, shown):
    long = [line for line in shown(command, 80).splitlines() if len(line.rstrip()) > 80]
    assert [line for line in long if "limits:" not in line and " ── " in line] == []


def test_a_runs_summary_has_a_unit_on_each_row_and_the_limits(shown):
    said = shown(TABLES["a run"], None)
    totals = said.partition("Totals\n")[2].partition("Latency, ms")[0].splitlines()[3:]
    rows = [re.split(r"  +", line.strip()) for line in totals if line]
    assert rows and all(len(row) == 3 and re.fullmatch(r"[\d,.]+%?", row[1]) for row in rows)
    assert ["input tokens", "3,600", "tokens"] in rows and ["prefix cache hit rate", "0.0%", "of tokens"] in rows
    assert "policy: vtc:input_weight=1:output_weight=4, prefix caching\nlimits: 256 sequences" in said


@pytest.mark.parametrize(
    ("of", "says", "lacks"),
    [
        ("outputs of one token", "Not measured: TPOT and ITL, for no output has a second token.", "TPOT  "),
        ("nothing completed", "No request completed: there are no latencies.", "Latency, ms"),
        ("rejected requests", "of 40 requests were rejected", "prefix cache"),
    ],
)
def test_what_a_run_has_not_measured_is_left_out_and_said(of, says, lacks, shown):
    said = shown(TABLES[of], None)
    assert says in said and lacks not in said


def test_policies_are_listed_from_their_own_code(shown):
    listed = json.loads(shown("policies --json", None))
    assert listed == list_policies() and [each["policy"] for each in listed] == [*POLICIES]
    for each in listed:
        assert each["parameters"] == parameters(POLICIES[each["policy"]])
        assert each["rule"].endswith(".") and each["source"].endswith(".")
    text = shown("policies", None)
    assert ":input_weight=1.0 :output_weight=2.0" in text and "Orca's scheduling (OSDI '22)" in text
