"""The verdict on a comparison: a table, and sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from analysis.comparison.targets import NOISY, NOTHING, OUTSIDE, WITHIN
from analysis.metrics.names import JUDGED_LATENCIES, latency_label
from analysis.report.caveats import seen_sentences
from analysis.report.tables import TextTable, amount, percent, signed

MODEL = "latency_model_mape"
LABELS = {f"mean_{name}": latency_label("mean", name) for name in JUDGED_LATENCIES} | {MODEL: "latency model MAPE"}
OPENINGS = {
    OUTSIDE: "Outside the error allowed",
    NOISY: "The machine was too noisy to judge (it differs from itself by more than the error allowed)",
    NOTHING: "Nothing to judge for",
    WITHIN: "Within the error allowed",
}
QUIETER = (
    "Close what else runs on the machine, pin the engine to cores of its own (taskset), serve a longer trace, or give "
    "more runs with --repeat."
)


def verdict_table(comparison: Mapping[str, Any]) -> TextTable:
    """Each error with its target, and the noise that it stands beside."""
    rows = []
    for name, item in comparison["verdict"].items():
        if item["verdict"] != NOTHING:
            error = (percent if name == MODEL else signed)(item["error"])
            noise = spread_cell(item["spread"], comparison), signed(item["drift"])
            rows.append((LABELS[name], item["verdict"], error, percent(item["allowed"]), *noise))
    note = (
        "Spread: of repeats of the real run; for the latency model, the MAPE that a perfect one would show. "
        "Drift: of the machine since it was profiled, on the same batches."
    )
    return TextTable("Verdict", note, ("", "verdict", "error", "allowed", "spread", "drift"), rows, labels=2)


def spread_cell(fraction: float | None, comparison: Mapping[str, Any]) -> str:
    """The spread of real runs, if there are several."""
    return percent(fraction) if comparison["repeats"] else "not repeated"


def verdict_sentences(comparison: Mapping[str, Any]) -> Iterator[str]:
    """The scope of the comparison, and the verdicts."""
    yield f"{comparison['requests']:,} requests were served for real and in simulation."
    yield decisions_sentence(comparison["decisions"])
    for word, opening in OPENINGS.items():
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
    """The label of an error; with the reason, if it cannot be judged."""
    if item["verdict"] != NOISY:
        return LABELS[name]
    if _is_spread(item):
        spread, allowed = percent(item["spread"]), percent(item["allowed"])
        return f"{LABELS[name]} (repeats differ by {spread}, {allowed} is allowed)"
    return f"{LABELS[name]} (the machine has moved by {signed(item['drift'])} since it was profiled)"


def _is_spread(item: Mapping[str, Any]) -> bool:
    return item["spread"] is not None and item["spread"] > item["allowed"]


def _noise_sentences(comparison: Mapping[str, Any]) -> Iterator[str]:
    """The state of the machine, and remedies against its noise."""
    yield from seen_sentences(comparison["machine"])
    noisy = [_is_spread(item) for item in comparison["verdict"].values() if item["verdict"] == NOISY]
    if any(noisy):
        yield QUIETER
    if not all(noisy):
        yield "Profile the machine again, and simulate on that."


# -- decisions -------------------------------------------------------------------------------------------------


def decisions_sentence(decisions: Mapping[str, Any]) -> str:
    """Whether the simulator planned the same, and whether falsified times were noticed."""
    sources = decisions.get("changed_sources")
    changed = f"{', '.join(sources)} changed since the real run was recorded. " if sources else ""
    opening, steps = f"{changed}Given the real run's times, the simulator planned", f"{decisions['steps']:,} steps"
    if difference := decisions["first_difference"]:
        return f"{opening} {difference['step']:,} of {steps} the same, then differently."
    return f"{opening} all {steps} the same. {_controls_sentence(decisions.get('negative_controls') or {})}".rstrip()


def _controls_sentence(controls: Mapping[str, bool | None]) -> str:
    """Whether the falsifications of `sim.negative_controls` were noticed."""
    tried = {name.replace("_", " "): noticed for name, noticed in controls.items() if noticed is not None}
    missed = [name for name, noticed in tried.items() if not noticed]
    if missed:
        return f"NOT NOTICED, so that this proves little: {', '.join(missed)}."
    return f"Falsified times were noticed ({', '.join(tried)})." if tried else ""


def difference_table(title: str, note: str, decisions: Mapping[str, Any], runs: tuple[str, str]) -> TextTable:
    """Two runs at the first step that they decided differently."""
    rows: list[tuple[str, ...]] = []
    if difference := decisions["first_difference"]:
        shared = {name: dict.fromkeys(runs, difference[name]) for name in ("step", "iteration")}
        compared = shared | {"digest": {run: difference[run] for run in runs}} | difference["columns"]
        rows = [(name, *(amount(of[run]) for run in runs)) for name, of in compared.items()]
    return TextTable(title, note, ("at the first difference", *runs), rows)
