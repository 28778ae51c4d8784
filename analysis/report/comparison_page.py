"""Shows a comparison to people: tables on a console, and one HTML page that needs no network.

It may not compute an error or a verdict: those come from `analysis.comparison`. It draws from the records of the runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from analysis.comparison.ablation import ablation_tables
from analysis.comparison.attribution import attribution_tables
from analysis.comparison.compare import (
    CLOSED_LOOP,
    NOISY,
    NOTHING,
    OUTSIDE,
    STATISTICS,
    WITHIN,
    flatten_manifest,
)
from analysis.jobs.machine_watch import seen_sentences
from analysis.metrics.names import LATENCIES, TOTALS
from analysis.report.caveats import NOTHING_COMPLETED, beyond_sentence, p99_sentence, sentences_by_run
from analysis.report.figures import LATENCY_NAMES, html_figures
from analysis.report.html import write_page
from analysis.report.tables import TextTable, amount, html_table, number, percent, print_tables, signed
from engine.records.run_folder import RunRecords

if TYPE_CHECKING:
    from rich.console import Console

JUDGED_NAMES = {
    "mean_ttft": "mean TTFT",
    "mean_tpot": "mean TPOT",
    "mean_e2el": "mean E2E",
    "latency_model_mape": "latency model MAPE",
}


def print_comparison(comparison: Mapping[str, Any], console: Console) -> None:
    """Print what is missing, the three parts of a comparison, where its error comes from, then the verdict and what it
    means."""
    from rich.text import Text

    if said := [*_caveats(comparison)]:
        console.print(Text("\n".join(said) + "\n"))
    print_tables((*_parts(comparison), *_explanations(comparison), _verdict_table(comparison)), console)
    console.print(Text(" ".join(_sentences(comparison))))


def write_report(
    comparison: Mapping[str, Any], sim: RunRecords, real: RunRecords, replayed: RunRecords, path: Path, *, title: str
) -> None:
    """Write a comparison as one self-contained HTML page, or nothing.

    Args:
        comparison: what `compare` returned for these runs.
        sim: the simulated run.
        real: the real run.
        replayed: the real run's batches with predicted times.
        path: the page.
        title: its heading.

    Raises:
        TandemError: the page cannot be written.
    """
    decisions, latency_model, closed_loop = (html_table(table) for table in _parts(comparison))
    body = _BODY.substitute(
        verdict=html_table(_verdict_table(comparison)),
        decisions=decisions,
        latency_model=latency_model,
        closed_loop=closed_loop,
        explanations="".join(html_table(table) for table in _explanations(comparison)),
        definitions="".join(
            f"<dt>{escape(name)}</dt><dd>{escape(LATENCIES[key].definition)}</dd>"
            for key, name in LATENCY_NAMES.items()
        ),
        totals=html_table(_totals_table(comparison["metrics"])),
        manifest=html_table(_manifest_table(real, sim)),
        **html_figures(comparison, sim, real, replayed),
    )
    write_page(path, title, headline(comparison), body)


# -- words -------------------------------------------------------------------------------------------------


def headline(comparison: Mapping[str, Any]) -> str:
    """What is missing, what was compared and what came of it, in plain sentences."""
    return " ".join((*_caveats(comparison), *_sentences(comparison)))


def _caveats(comparison: Mapping[str, Any]) -> Iterator[str]:
    """What must be known before any number: requests that did not complete, and what was extrapolated."""
    yield from sentences_by_run(comparison["not_completed"], comparison["asked"])
    if not comparison["requests"]:
        yield NOTHING_COMPLETED
    elif _is_some_missing(comparison):
        yield f"Latencies are of the {comparison['requests']:,} that completed in both runs."
    if beyond := beyond_sentence(comparison["coverage"]):
        yield beyond


def _is_some_missing(comparison: Mapping[str, Any]) -> bool:
    return bool(comparison["requests"] < comparison["asked"])


def _sentences(comparison: Mapping[str, Any]) -> Iterator[str]:
    yield f"{comparison['requests']:,} requests were served for real and in simulation."
    yield _decisions_sentence(comparison["decisions"])
    for word, opening in (
        (OUTSIDE, "Outside the error allowed"),
        (NOISY, "The machine was too noisy to judge (it differs from itself by more than the error allowed)"),
        (NOTHING, "Nothing to judge for"),
        (WITHIN, "Within the error allowed"),
    ):
        items = [_judged(name, item) for name, item in comparison["verdict"].items() if item["verdict"] == word]
        if items:
            yield f"{opening}: {', '.join(items)}."
        if items and word == NOISY:
            yield from _noise_sentences(comparison)
    if not comparison["repeats"]:
        yield "The real run was not repeated, so its own noise is unknown."
    for name in comparison["partial"]:
        yield f"The {name} run was interrupted: it counts up to there."
    if fields := comparison["manifest_differences"]:
        yield f"The runs were allowed to differ in {', '.join(fields)}."


def _judged(name: str, item: Mapping[str, Any]) -> str:
    """The name of what is judged; of what cannot be, why not."""
    if item["verdict"] != NOISY:
        return JUDGED_NAMES[name]
    if _is_spread(item):
        spread, allowed = percent(item["spread"]), percent(item["allowed"])
        return f"{JUDGED_NAMES[name]} (repeats differ by {spread}, {allowed} is allowed)"
    return f"{JUDGED_NAMES[name]} (the machine has moved by {signed(item['drift'])} since it was profiled)"


def _is_spread(item: Mapping[str, Any]) -> bool:
    return item["spread"] is not None and item["spread"] > item["allowed"]


def _noise_sentences(comparison: Mapping[str, Any]) -> Iterator[str]:
    """What was seen of the machine, and what to do about its noise."""
    yield from seen_sentences(comparison["machine"])
    noisy = [_is_spread(item) for item in comparison["verdict"].values() if item["verdict"] == NOISY]
    if any(noisy):
        yield (
            "Close what else runs on the machine, pin the engine to cores of its own (taskset), serve a longer trace, "
            "or give more runs with --repeat."
        )
    if not all(noisy):
        yield "Profile the machine again, and simulate on that."


def _decisions_sentence(decisions: Mapping[str, Any]) -> str:
    if changed := decisions.get("changed_sources"):
        return f"{', '.join(changed)} changed since the real run was recorded. {_equal_steps_sentence(decisions)}"
    return _equal_steps_sentence(decisions)


def _equal_steps_sentence(decisions: Mapping[str, Any]) -> str:
    if decisions["identical"]:
        same = f"Given the real run's times, the simulator planned all {decisions['steps']:,} steps the same."
        return f"{same} {_controls_sentence(decisions.get('negative_controls') or {})}".rstrip()
    first, steps = decisions["first_difference"]["step"], decisions["steps"]
    return f"Given the real run's times, the simulator planned {first:,} of {steps:,} steps the same, then differently."


def _controls_sentence(controls: Mapping[str, bool | None]) -> str:
    """What became of the falsifications of `sim.negative_controls`."""
    tried = {name.replace("_", " "): noticed for name, noticed in controls.items() if noticed is not None}
    missed = [name for name, noticed in tried.items() if not noticed]
    if missed:
        return f"NOT NOTICED, so that this proves little: {', '.join(missed)}."
    return f"Falsified times were noticed ({', '.join(tried)})." if tried else ""


def _parts(comparison: Mapping[str, Any]) -> tuple[TextTable, TextTable, TextTable]:
    return (
        _decisions_table(comparison["decisions"]),
        _latency_model_table(comparison["latency_model"]),
        _closed_loop_table(comparison),
    )


def _explanations(comparison: Mapping[str, Any]) -> list[TextTable]:
    """Where the error comes from, and what the model's terms are worth if that was asked for."""
    return [*attribution_tables(comparison["attribution"]), *ablation_tables(comparison.get("ablation"))]


def _verdict_table(comparison: Mapping[str, Any]) -> TextTable:
    rows = []
    for name, item in comparison["verdict"].items():
        if item["verdict"] == NOTHING:
            continue
        error = (percent if name == "latency_model_mape" else signed)(item["error"])
        noise = (_spread(item["spread"], comparison["repeats"]), signed(item["drift"]))
        shown = (error, percent(item["allowed"]), *noise)
        rows.append((JUDGED_NAMES[name], item["verdict"], *shown))
    note = (
        "Spread: of repeats of the real run; for the latency model, the MAPE that a perfect one would show. "
        "Drift: of the machine since it was profiled, on the same batches."
    )
    return TextTable("Verdict", note, ("", "verdict", "error", "allowed", "spread", "drift"), rows, labels=2)


def _decisions_table(decisions: Mapping[str, Any]) -> TextTable:
    rows: list[tuple[str, str, str]] = []
    if difference := decisions["first_difference"]:
        shared = {name: {"real": difference[name], "replay": difference[name]} for name in ("step", "iteration")}
        digests = {"digest": {"real": difference["real"], "replay": difference["replay"]}}
        compared = shared | digests | difference["columns"]
        rows = [(name, amount(both["real"]), amount(both["replay"])) for name, both in compared.items()]
    columns = ("at the first difference", "real", "replay")
    return TextTable("1. Decisions: the real run against its replay", _decisions_sentence(decisions), columns, rows)


def _latency_model_table(latency_model: Mapping[str, Any]) -> TextTable:
    rows = [
        (kind, f"{part['steps']:,}", percent(part["mape"]), signed(part["mean_error"]))
        for kind, part in latency_model.items()
    ]
    title = "2. Latency model: predicted against measured time of the same batches"
    return TextTable(title, "", ("kind of step", "steps", "MAPE", "mean error"), rows)


def _closed_loop_table(comparison: Mapping[str, Any]) -> TextTable:
    columns = ("", "", "real ms", "sim ms", "error", "spread", "MAPE", "KS")
    rows = []
    for name in CLOSED_LOOP:
        part, spread = comparison["closed_loop"][name], comparison["repeat_spread"][name]
        whole = (percent(part["mape"]), number(part["ks"]))
        for stat in STATISTICS:
            pair, first = part[stat], stat == STATISTICS[0]
            if pair["real"] is None and pair["sim"] is None:
                continue
            values = (number(pair["real"]), number(pair["sim"]), signed(pair["error"]))
            spread_shown = _spread(spread[stat], comparison["repeats"])
            head, tail = (LATENCY_NAMES[name], whole) if first else ("", ("", ""))
            rows.append((head, stat, *values, spread_shown, *tail))
    note = "Spread: of repeats of the real run. MAPE: per request. KS: distance of the two distributions."
    note = f"{note} {p99_sentence(comparison['requests'])}".rstrip() if rows else NOTHING_COMPLETED
    return TextTable(f"3. Closed loop: what {_whose(comparison)} saw", note, columns, rows, labels=2)


def _whose(comparison: Mapping[str, Any]) -> str:
    if not _is_some_missing(comparison):
        return "the requests"
    return f"the {comparison['requests']:,} of {comparison['asked']:,} requests that completed in both runs"


def _totals_table(of_runs: Mapping[str, Any]) -> TextTable:
    known = {name: of for name, of in TOTALS.items() if any(each[name] is not None for each in of_runs.values())}
    rows = [
        (name, text.definition, *(amount(of_runs[run][name]) for run in ("real", "sim")))
        for name, text in known.items()
    ]
    return TextTable("Totals", "", ("", "", "real", "sim"), rows, labels=2)


def _manifest_table(real: RunRecords, sim: RunRecords) -> TextTable:
    ours, theirs = (flatten_manifest(run, ("workload", "system", "provenance")) for run in (real, sim))
    fields = list(dict.fromkeys([*ours, *theirs]))
    rows = [(field, str(ours.get(field, "–")), str(theirs.get(field, "–"))) for field in fields]
    return TextTable("Manifest", "", ("field", "real", "simulated"), rows, labels=3)


def _spread(fraction: float | None, repeats: int) -> str:
    return percent(fraction) if repeats else "not repeated"


# -- the page ----------------------------------------------------------------------------------------------


_BODY = Template("""$verdict
$decisions
$latency_model
<figure>$steps_figure<figcaption>Each dot is a step of the real run. Above the line, the latency model predicts too
much. Where there are many, evenly spaced ones are drawn.</figcaption></figure>
$closed_loop
<dl>$definitions</dl>
<figure>$cdf_figure<figcaption>The fraction of values at or below a latency: of requests, or for ITL of all
gaps. Where there are many, evenly spaced ones are drawn.</figcaption></figure>
$explanations
<h2>Batch and KV cache over time</h2>
<figure>$time_figure<figcaption>As each step was planned; 0 while the serving loop waits for arrivals. In a long run,
a point is the highest of several steps.</figcaption></figure>
$totals
$manifest
""")
