"""What people get to see: one page that works without a network, and tables on a console."""

from __future__ import annotations

import io
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from shadow import small_profile
from test_compare import CONFIG, MS, as_replay, replayed, serve, with_column, with_manifest, workload

from analysis.comparison.ablation import ablate
from analysis.comparison.compare import compare
from analysis.report.attribution_tables import attribution_sentence
from analysis.report.comparison_page import headline, print_comparison, write_report
from analysis.report.figures import MAX_POINTS
from engine.records.manifest import system
from engine.records.run_folder import RunRecords
from traces.errors import TandemError
from traces.request import TraceRequest


class Page(HTMLParser):
    """Collects what a page loads from elsewhere, its figures, its table rows and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.figures: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "wbr"):
            self._open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.figures += [value for name, value in attrs if name == "id" and value.startswith("figure-")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        if inside in ("td", "th"):
            self.rows[-1][-1] += data
        if inside not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def sim() -> RunRecords:
    return serve()


@pytest.fixture(scope="module")
def real() -> RunRecords:
    return serve(1.05)


def write(folder: Path, sim: RunRecords, real: RunRecords, title: str = "A comparison") -> str:
    replay = replayed(real)
    write_report(compare(sim, real, replay), sim, real, replay, folder / "report.html", title=title)
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    return (folder / "report.html").read_text()


def printed(comparison: dict) -> str:
    output = io.StringIO()
    print_comparison(comparison, Console(file=output, width=100))
    return output.getvalue()


def test_the_page_loads_nothing_and_brings_plotly_once(tmp_path, sim, real):
    html = write(tmp_path, sim, real)
    page = Page(html)
    assert page.loads == []
    of_latencies = [f"figure-cdf-{name}" for name in ("ttft", "tpot", "itl", "e2el")]
    assert page.figures == ["figure-steps", *of_latencies, "figure-time"]
    assert html.count("Plotly.newPlot(") >= len(page.figures)
    assert html.count("* plotly.js v") == 1
    assert "@import" not in html.split("<body>")[0]


def test_the_page_says_what_was_compared_and_shows_every_part(tmp_path, sim, real):
    comparison = compare(sim, real, replayed(real))
    page = Page(write(tmp_path, sim, real))
    assert "A comparison" in page.text
    assert headline(comparison) in page.text
    ttft = comparison["closed_loop"]["ttft"]["p50"]
    shown = ["", "p50", f"{ttft['real']:,.2f}", f"{ttft['sim']:,.2f}", f"{ttft['error']:+.1%}", "not repeated", "", ""]
    assert shown in page.rows
    decode = comparison["latency_model"]["decode"]
    assert ["decode", str(decode["steps"]), f"{decode['mape']:.1%}", f"{decode['mean_error']:+.1%}"] in page.rows
    assert ["system.num_blocks", "60", "60"] in page.rows
    assert ["provenance.host", "machine 1.05", "machine 1.0"] in page.rows


def explained(sim: RunRecords, real: RunRecords) -> dict:
    config = with_manifest(real, "system", **system("test", CONFIG))
    ablation = ablate(config, replayed(real), small_profile(), ["head"])
    return compare(sim, real, replayed(real)) | {"ablation": ablation}


def test_the_page_says_where_the_error_comes_from_and_what_the_models_terms_are_worth(tmp_path, sim, real):
    comparison = explained(sim, real)
    write_report(comparison, sim, real, replayed(real), tmp_path / "report.html", title="")
    page = Page((tmp_path / "report.html").read_text())
    attribution = comparison["attribution"]
    assert attribution_sentence(attribution) in page.text
    terms = [part["terms"]["decode"] for part in attribution["latencies"].values()]
    shown = [cell for term in terms for cell in (f"{term['ms']:+z,.3f}", f"{term['error']:+z.1%}")]
    assert ["decode steps", *shown] in page.rows
    dense = attribution["kernels"]["kernels"]["dense"]
    relative = [f"{dense['error']:+.1%}", f"±{dense['uncertainty']:.1%}"]
    absolute = [f"{dense['ms_per_step']:+.3f}", f"±{dense['ms_uncertainty']:.3f}"]
    assert ["dense", f"{dense['steps']:,}", *relative, *absolute, "yes"] in page.rows
    closed_loop = comparison["ablation"]["head"]["closed_loop"]
    assert ["head", "60", *(f"{error:+.1%}" for error in closed_loop.values())] in page.rows


def test_the_console_says_where_the_error_comes_from_within_80_columns(sim, real):
    comparison = explained(sim, real)
    output = io.StringIO()
    print_comparison(comparison, Console(file=output, width=80))
    text = output.getvalue()
    assert attribution_sentence(comparison["attribution"]) in " ".join(text.split())
    lines = [line.rstrip() for line in text.splitlines()]
    terms = lines[lines.index("Where the closed-loop error of the means comes from") :]
    rows = [line for line in terms if line.split(" ")[1:2] in (["steps"], ["between"], ["and"])][:5]
    assert len({len(row) for row in rows}) == 1 and "…" not in text


def test_where_decisions_differ_the_page_says_that_the_error_is_not_broken_down(sim):
    cut = replace(sim, tables=sim.tables | {"steps": sim.tables["steps"].slice(0, 10)})
    assert "Not broken down: the decisions differ" in printed(compare(sim, sim, as_replay(cut)))


def test_text_from_outside_is_escaped(tmp_path, sim, real):
    attack = "<script>alert('&')</script>"
    html = write(tmp_path, sim, with_manifest(real, "provenance", host=attack), title=attack)
    page = Page(html)
    assert attack not in html
    assert page.text.count(attack) == 3  # title bar, heading, manifest
    assert ["provenance.host", attack, "machine 1.0"] in page.rows


def test_the_same_comparison_gives_the_same_page(tmp_path, sim, real):
    assert write(tmp_path, sim, real) == write(tmp_path, sim, real)


def test_a_run_in_which_nothing_ran_still_makes_a_page(tmp_path):
    rejected = serve(requests=workload(prompt_len=500))
    page = Page(write(tmp_path, rejected, rejected))
    assert "0 requests were served" in page.text
    assert "Nothing to judge for: mean TTFT, mean TPOT, mean E2E, latency model MAPE." in page.text
    said = [page.text.index(words) for words in ("real, sim: 40 of 40 requests were rejected", "No request completed")]
    assert said == sorted(said) and said[1] < page.text.index("Verdict")
    numbers = [row for row in page.rows if row[0] not in ("Manifest",) and set(row[1:]) == {"–"}]
    assert numbers == [], "a table of what is not there"


def test_long_curves_are_thinned_and_the_figures_say_so(tmp_path):
    tokens = MAX_POINTS // 30
    long = serve(requests=[TraceRequest(i, i * 1000 * MS, 10, tokens, tokens) for i in range(40)])
    steps = 40 * tokens
    assert len(long.tables["steps"]) == steps > MAX_POINTS
    html = write(tmp_path, long, long)
    assert f"decode, {MAX_POINTS:,} of {steps - 40:,} steps" in html
    assert f"measured, {MAX_POINTS:,} of {steps + 40:,} points" in html  # 39 waits for arrivals, and the end


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond a tenth of a page."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, sim, real):
    page = tmp_path / "report.html"
    page.write_text("old")
    replay = replayed(real)
    comparison = compare(sim, real, replay)
    with pytest.raises(TandemError, match=r"cannot write .*report\.html"), full_disk():
        write_report(comparison, sim, real, replay, page, title="")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_the_console_shows_the_three_parts_and_the_verdict_in_lines_that_align(sim, real):
    lines = printed(compare(sim, real, replayed(real), [serve(1.07)])).splitlines()
    heads = [next(i for i, line in enumerate(lines) if line.startswith(title)) for title in ("1.", "2.", "3.", "Verd")]
    assert heads == sorted(heads)
    closed_loop = [
        line for line in lines[heads[2] : heads[3]] if line.split()[-1:] and line.rstrip()[-1] in "%0123456789–"
    ]
    values = [line for line in closed_loop if " p50 " in line or " p90 " in line]
    assert len(values) == 8
    assert len({line.rstrip().rindex("%") for line in values}) == 1
    assert max(len(line.rstrip()) for line in lines) <= 100
    assert any(line.split()[:3] == ["mean", "TTFT", "within"] for line in lines[heads[3] :])


def test_the_console_shows_how_decisions_differ(sim):
    arrivals = sim.tables["requests"]["delivered_ns"].to_pylist()
    late = with_column(sim, "requests", "delivered_ns", [*arrivals[:20], arrivals[20] + 10 * MS, *arrivals[21:]])
    comparison = compare(sim, sim, replayed(late))
    difference = comparison["decisions"]["first_difference"]
    text = printed(comparison)
    assert (
        f"planned {difference['step']} of {comparison['decisions']['steps']} steps the same, then differently" in text
    )
    assert difference["real"] in text
    assert difference["replay"] in text


def test_the_headline_does_not_call_a_noisy_machine_a_success(sim):
    text = headline(compare(sim, sim, replayed(sim), [serve(2.0)]))
    assert "too noisy to judge" in text
    assert "Within" not in text


def test_who_is_missing_is_said_before_any_number_and_beside_the_closed_loop(tmp_path, sim, real):
    outcomes = real.tables["requests"]["outcome"].to_pylist()
    fewer = with_column(real, "requests", "outcome", ["cancelled"] * 5 + outcomes[5:])
    text = printed(compare(sim, fewer, replayed(real)))
    assert text.startswith("real: 5 of 40 requests were cancelled: their clients gave up.")
    assert "Latencies are of the 35 that completed in both runs." in text.split("1. Decisions")[0]
    assert "3. Closed loop: what the 35 of 40 requests that completed in both runs saw" in text
    page = Page(write(tmp_path, sim, fewer))
    assert page.text.index("real: 5 of 40 requests") < page.text.index("Verdict")


def test_what_was_extrapolated_is_said_before_any_number(sim, real):
    beyond = {"lookups": 0.12, "device_time": 0.31, "axes": {"context": {"asked": [9, 12_000], "measured": [1, 8192]}}}
    coverage = {"lookups": 100, "beyond": {"decode_attention": beyond}}
    comparison = compare(sim, real, replace(replayed(real), coverage=coverage))
    line = (
        "Beyond the profile: decode attention 12 % of its look-ups, 31 % of the device time "
        "(context to 12,000, measured to 8,192)."
    )
    assert line in " ".join(printed(comparison).split("1. Decisions")[0].split()) and line in headline(comparison)


def test_a_noisy_verdict_says_by_how_much_what_was_seen_and_what_to_do(sim):
    seen = {"cores": 2, "load_average": [1.0, 3.14], "steal": 0.12, "others": 0.34}
    text = headline(compare(sim, with_manifest(sim, "provenance", machine=seen), replayed(sim), [serve(2.0)]))
    assert re.search(r"mean TPOT \(repeats differ by [\d.]+%, 10.0% is allowed\)", text)
    assert "During real: other processes took 34% of the CPU time, the hypervisor took (steal) 12%" in text
    assert "During repeat 1: not recorded what else the machine did." in text
    assert "Close what else runs" in text and "--repeat" in text


def test_where_the_machine_has_moved_the_verdict_says_to_profile_again(sim, real):
    text = headline(compare(sim, real, replayed(real), [real], drift={"mean_error": 0.2, "mape": 0.2}))
    assert "mean TTFT (the machine has moved by +20.0% since it was profiled)" in text
    assert "Profile the machine again" in text and "Close what else runs" not in text


def test_the_headline_says_what_limits_the_comparison(sim, real):
    partial = replace(with_manifest(real, "system", num_blocks=99), partial=True)
    text = headline(compare(sim, partial, replayed(real), allow_different=["system.num_blocks"]))
    assert "The real run was not repeated, so its own noise is unknown." in text
    assert "The real run was interrupted" in text
    assert "allowed to differ in system.num_blocks" in text


def test_the_headline_names_what_is_outside_and_what_is_within(sim):
    real = serve(1.2)
    targets_missed = headline(compare(sim, real, replayed(real)))
    assert "Outside the error allowed: mean TTFT" in targets_missed
