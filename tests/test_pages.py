"""Every HTML page in a real browser: on a desk, a tablet and a phone, by day and by night."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from browser import chromium, needs_chromium
from shadow import small_profile

from analysis.comparison.compare import compare
from analysis.comparison.policies import compare_policies, compare_simulations
from analysis.report.comparison_page import write_report
from analysis.report.figures import COLOURS, HUES, KINDS
from analysis.report.policy_page import write_policy_page
from analysis.report.short_names import short_names
from engine.config import ServingConfig
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from engine.server.app import STATUS_PAGE
from sim.replay import replay
from sim.simulate import predict
from traces.request import TraceRequest

FAULTS = (Path(__file__).parent / "page_faults.js").read_text()
DOCS = Path(__file__).parents[1] / "docs"
CONFIG = ServingConfig(num_blocks=600, max_seqs=32, max_batched_tokens=256, max_model_len=1000)
MINE = "/a/long/path/to/serving-experiments-of-2026/policies/my_policy_with_aging.py:ShortestWithAging"
NINE = [
    *(f"{MINE}:ms_per_token={ms}:starve_ms=20000" for ms in (1, 10, 100)),
    *("chunked_prefill", "chunked_prefill:budget=512", "prefill_first", "fcfs", "vtc", "sjf"),
]
MODEL, DEVICE = "a-model-with-a-name-of-many-letters/llama-3-8b-instruct-v2.1", "NVIDIA H100 80GB HBM3"


def requests(count: int) -> list[TraceRequest]:
    return [TraceRequest(i, i * 3 * 10**6, 5 + i * 7 % 90, 2 + i % 17, 2 + i % 17) for i in range(count)]


def serve(count: int = 60, scale: float = 1.0, backend: str = "simulator", policy: str = "sjf") -> RunRecords:
    """Requests on a machine that is `scale` times as slow as the profile says."""
    recorder = Recorder()
    predict(requests(count), CONFIG, small_profile(scale), recorder)
    manifest = {
        "workload": {"trace": "4ef10b57fb29" + 52 * "0", "requests": count, "model": MODEL, "dtype": "float16"},
        "system": {"device": DEVICE, "scheduler": policy, "num_blocks": 600},
        "provenance": {"date": f"2026-11-2{int(scale) % 8}T20:22:02+00:00", "backend": backend, "command": 9 * MINE},
    }
    return RunRecords(manifest, recorder.tables())


def report(path: Path, count: int, scale: float) -> None:
    sim, real = serve(count), serve(count, scale, "executor")
    replayed = replay(real, CONFIG, small_profile())
    write_report(compare(sim, real, replayed), sim, real, replayed, path, title=f"{NINE[0]} at depth 2: both")


def policies(path: Path, runs: dict[str, RunRecords]) -> None:
    write_policy_page(compare_policies(runs), runs, path, f"{len(runs)} policies, on {MODEL} on {DEVICE}")


def simulations(path: Path) -> None:
    runs = {f"runs/{'of-a-long-sweep/' * 6}{name}": serve(scale=scale) for name, scale in (("a", 1), ("b", 20_000))}
    write_policy_page(compare_simulations(runs), runs, path, f"{' and '.join(runs)}: two simulations")


def notebook(path: Path) -> None:
    """The plot of the page on notebooks, by the lines of that page, of other times."""
    import pandas as pd

    (program,) = re.findall(r"```python\n(.*?)```", (DOCS / "notebook.md").read_text(), re.DOTALL)
    drawn = program[program.index("times = ") :].replace("cdf.html", str(path))
    ttft = np.random.default_rng(0).lognormal(4, 1, 2000)
    runs = {
        name: type("Run", (), {"requests": pd.DataFrame({"ttft_ms": ttft * scale})})
        for name, scale in (("fcfs", 1), ("prefill_first", 2))
    }
    exec(program[: program.index("\n")] + "\n" + drawn, {"runs": runs})


PAGES = {
    "a comparison of 2,000 requests": lambda path: report(path, 2000, 1.2),
    "a comparison of one request": lambda path: report(path, 1, 1.2),
    "nine policies": lambda path: policies(path, {name: serve(scale=1 + 0.1 * i) for i, name in enumerate(NINE)}),
    "two simulations far apart": simulations,
    "the plot of a notebook": notebook,
}
STATUS = {
    "time_s": 1.0, "model": MODEL, "scheduler": NINE[0], "facts": {"backend": "sim", "device": DEVICE}, "alive": True,
    "max_seqs": 123_456, "kv_blocks": 12_345_678, "open": 123_456, "generated": 10**9, "outcomes": {"length": 10**7},
    "load": {"step": 10**8, "prefill_total": 10**10, "decode_total": 10**9, "running": 123_456, "waiting": 123_456,
             "kv_blocks_used": 9_876_543, "preemptions": 123_456},
    "ttft": {"bounds_ms": [1e6], "counts": [9, 0]}, "itl": {"bounds_ms": [0.001], "counts": [9, 0]},
}  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    paths = {kind: folder / f"{place}.html" for place, kind in enumerate(PAGES)}
    for kind, path in paths.items():
        PAGES[kind](path)
    return paths


def open_page(browser, path: Path, **options):
    page = browser.new_context(viewport={"width": 1280, "height": 900}, **options).new_page()
    page.add_init_script(f"window.fetch = async () => ({{ json: async () => ({json.dumps(STATUS)}) }})")
    page.goto(path.as_uri())
    return page


@pytest.fixture(scope="module")
def opened(browser, written) -> Callable:
    """Opens a page by its kind, once."""
    return cache(lambda kind: open_page(browser, written[kind]))


def faults(page) -> list[str]:
    """What is wrong at any width, by day and by night."""
    found = []
    for width in (1280, 800, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(450)  # the plots follow after a moment
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            found += [f"{width} px, {scheme}: {fault}" for fault in lasting_faults(page)]
    return found


def lasting_faults(page) -> list[str]:
    """What is still wrong after two seconds: a busy machine draws late."""
    for _ in range(5):
        if not (found := page.evaluate(FAULTS)):
            return []
        page.wait_for_timeout(400)
    return found


@needs_chromium
@pytest.mark.parametrize("kind", PAGES)
def test_a_page_fits_its_window_and_its_words_neither_meet_nor_fade(opened, kind):
    assert faults(opened(kind)) == []


@needs_chromium
def test_the_status_page_fits_its_window_and_its_words_neither_meet_nor_fade(browser):
    page = open_page(browser, STATUS_PAGE)
    page.wait_for_function("document.getElementById('state').textContent === 'serving'")
    assert faults(page) == []


@needs_chromium
def test_ticks_of_log_axes_are_whole_numbers_in_order(opened):
    plots = "[...document.querySelectorAll('[id^=figure-cdf], #figure-steps')]"
    read = f"{plots}.map(plot => [...plot.querySelectorAll('.xtick text')].map(tick => tick.textContent))"
    for ticks in opened("a comparison of 2,000 requests").evaluate(read):
        values = [float(tick.replace(",", "")) for tick in ticks]
        assert len(values) >= 2 and all(one < other for one, other in pairwise(values))


@needs_chromium
def test_a_click_in_a_legend_hides_its_curves_in_every_plot_below(opened):
    plots = "[...document.querySelectorAll('[id^=figure-cdf]')]"
    shown = f"{plots}.map(plot => plot.querySelectorAll('.scatterlayer .trace').length)"
    page = opened("nine policies")
    assert page.evaluate(shown) == [9, 9, 9, 9]
    page.click("figure:first-of-type .legend button:nth-child(4)")
    assert page.evaluate(shown) == [8, 8, 8, 8]


@needs_chromium
def test_without_scripts_the_tables_stand_and_the_page_says_what_is_missing(browser, written):
    page = open_page(browser, written["nine policies"], java_script_enabled=False)
    assert page.locator("td").first.is_visible() and "figures need JavaScript" in page.inner_text("body")


def test_a_page_names_model_gpu_trace_and_date_in_its_header_and_its_window(written):
    html = written["a comparison of 2,000 requests"].read_text()
    window, header = re.search("<title>(.*)</title>", html)[1], re.search('<dl class="facts">(.*?)</dl>', html)[1]
    for fact in (f"{MODEL} float16", DEVICE, "4ef10b57fb29", "2,000", "2026-11-21 20:22 UTC"):
        assert fact in window and fact in header


def test_the_full_name_of_a_policy_stays_within_reach(written):
    html = written["nine policies"].read_text()
    for name in NINE[:3]:
        short = short_names(NINE)[name]
        assert html.count(f'title="{name}"') >= 7, "in every table and legend"
        assert f'"name":{json.dumps(short)}' in html and f'"name":"{name}"' not in html


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["sjf", "fcfs"], ["sjf", "fcfs"]),
        (["/long/path/mine.py:A:x=1", "/long/path/mine.py:A:x=2"], ["A:x=1", "A:x=2"]),
        (["p.py:A:x=1:y=5", "p.py:A:x=2:y=5", "fcfs"], ["A:…:x=1", "A:…:x=2", "fcfs"]),
        (["p.py:A", "p.py:A:x=2"], ["A", "A:x=2"]),
        (["a/p.py:A:x=1", "b/p.py:A:x=1"], ["a/p.py:A:x=1", "b/p.py:A:x=1"]),
        (["a/p.py:A", "a/q.py:A", "a/q.py:B"], ["p.py:A", "q.py:A", "B"]),
        (["p.py:sjf", "sjf"], ["p.py:sjf", "sjf"]),
        (["out/sim", "again/sim", "/sim"], ["out/sim", "again/sim", "/sim"]),
        (["p.py:A:x=1:y=2", "p.py:A:y=2:x=1"], ["p.py:A:x=1:y=2", "p.py:A:y=2:x=1"]),
        (["only/one.py:A:x=1"], ["A:x=1"]),
    ],
)
def test_names_are_shortened_to_what_tells_them_apart(names, short):
    assert list(short_names(names).values()) == short


def luminance(colour: str) -> float:
    """As WCAG 2 defines it."""
    parts = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return float(np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("colour", sorted({*HUES, *COLOURS.values(), *(colour for colour, _ in KINDS.values())}))
def test_a_curve_stands_out_on_a_light_page_and_on_a_dark_one(colour):
    for background in ("#ffffff", "#12161d"):
        low, high = sorted((luminance(colour), luminance(background)))
        assert (high + 0.05) / (low + 0.05) >= 3


def test_kinds_of_steps_differ_in_colour_and_in_symbol():
    colours, symbols = zip(*KINDS.values(), strict=True)
    assert len({*colours}) == len({*symbols}) == len(KINDS)
