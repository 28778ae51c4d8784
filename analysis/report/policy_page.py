"""Shows policies, or two simulations, side by side: tables on a console, and one HTML page.

Differences are to the first policy. It draws from the records of the runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.comparison.errors import relative_difference
from analysis.metrics.names import COMPARED_STATISTICS, JUDGED_LATENCIES, LATENCIES, TOTALS, latency_label
from analysis.report.caveats import NOTHING_COMPLETED, beyond_sentences, p99_sentence, sentences_by_run
from analysis.report.figures import bar_figure, cdf_figure
from analysis.report.html import Definitions, Heading, Part, write_page
from analysis.report.run_facts import run_facts
from analysis.report.short_names import renamed, short_names
from analysis.report.tables import TextTable, amount, number, signed
from analysis.report.verdict import difference_table
from engine.records.run_folder import RunRecords

UNMEASURED = "Two simulations: nothing here is measured."

Values = Mapping[str, float | None]  # by policy


def policy_tables(comparison: Mapping[str, Any]) -> list[TextTable]:
    """Caveats, then latencies, totals and, if there are several clients, those of each: a row for each policy.

    Of two simulations, first that nothing is measured, and last the fields that differ, and where decisions part.
    """
    missing, differences = "\n".join(caveats(comparison)), _differences(comparison)
    unmeasured = [TextTable(UNMEASURED)] if differences else []
    before = [TextTable("Before the numbers", missing)] if missing else []
    return [*unmeasured, *before, *_number_tables(comparison), *differences]


def write_policy_page(comparison: Mapping[str, Any], runs: Mapping[str, RunRecords], path: Path, title: str) -> None:
    """Write the comparison as one self-contained HTML page.

    Args:
        comparison: what `compare_policies` or `compare_simulations` returned for these runs.
        runs: by policy, or by name.
        path: the file.
        title: its heading.

    Raises:
        TandemError: the file cannot be written.
    """
    short = short_names(comparison["policies"])
    facts, comparison = run_facts(runs), renamed(comparison, short)
    (latency, *others), differences = _number_tables(comparison), _differences(comparison)
    names, full = _names(comparison), {of: name for name, of in short.items() if of != name}
    metrics = [*(LATENCIES[name] for name in comparison["latencies"]), *(TOTALS[name] for name in comparison["totals"])]
    parts: tuple[Part, ...] = (
        latency,
        cdf_figure({names[short[policy]]: run for policy, run in runs.items()}, "A click on a policy hides it. "),
        bar_figure(comparison["latencies"], names),
        *others,
        *differences,
        *([Definitions(full, "Names in full")] if full else []),
        Definitions({metric.heading: metric.definition for metric in metrics}, "Definitions"),
    )
    sentences = " ".join([*([UNMEASURED] if differences else []), *caveats(comparison), _headline(comparison)])
    shown = full | {names[of]: name for of, name in full.items()}
    write_page(path, Heading(title, facts, sentences, shown), parts)


# -- words -----------------------------------------------------------------------------------------------------


def caveats(comparison: Mapping[str, Any]) -> Iterator[str]:
    """Sentences before any number: requests that a policy did not complete, and extrapolation."""
    yield from sentences_by_run(comparison["not_completed"], comparison["asked"])
    if not comparison["same"]:
        yield f"They did not complete the same requests: latencies are of the {comparison['requests']:,} that all did."
    if not comparison["requests"]:
        yield NOTHING_COMPLETED
    yield from beyond_sentences(comparison["coverage"])


def _headline(comparison: Mapping[str, Any]) -> str:
    """Which policy is best by each mean, in a sentence."""
    best = []
    for name in JUDGED_LATENCIES:
        known = {policy: of for policy, of in comparison["latencies"][name]["mean"].items() if of is not None}
        if known:
            policy = min(known, key=lambda each: known[each])
            best.append(f"{latency_label('mean', name)} {_names(comparison)[policy]} ({number(known[policy])} ms)")
    lowest = f" Lowest: {', '.join(best)}." if best else ""
    return f"{comparison['requests']:,} requests completed under all of {', '.join(comparison['policies'])}.{lowest}"


def _names(comparison: Mapping[str, Any]) -> dict[str, str]:
    """Policies as figures and sentences call them."""
    return {policy: f"{policy} ({side[1]})" if side[1:] else policy for policy, side in _sides(comparison).items()}


def _sides(comparison: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """For each policy the cells beside every number: its name, and how many requests it completed if these differ."""
    completed, asked = comparison["totals"]["completed"], comparison["asked"]
    counts = {} if comparison["same"] else {policy: f"{count:,} of {asked:,}" for policy, count in completed.items()}
    return {policy: (policy, counts[policy]) if counts else (policy,) for policy in comparison["policies"]}


# -- tables ----------------------------------------------------------------------------------------------------


def _number_tables(comparison: Mapping[str, Any]) -> list[TextTable]:
    note = (
        f"Of the {comparison['requests']:,} requests that all completed; differences to {comparison['policies'][0]}. "
        f"{p99_sentence(comparison['requests'])}"
    ).rstrip()
    found = {name: of for name, of in comparison["latencies"].items() if _is_known(of["mean"])}
    shown = [stat for stat in COMPARED_STATISTICS if any(_is_known(of[stat]) for of in found.values())]
    latencies = {(LATENCIES[name].label,): [of[stat] for stat in shown] for name, of in found.items()}
    totals = {name: of for name, of in comparison["totals"].items() if any(of.values())}
    if not comparison["same"]:
        totals.pop("completed", None)  # it is beside the policy
    sides, heads = _sides(comparison), _heads(comparison)
    rows = [(*side, *(amount(of[policy]) for of in totals.values())) for policy, side in sides.items()]
    columns, of_each = [TOTALS[name].heading for name in totals], "Of the requests that each completed."
    tables = [
        _latency_table(comparison, TextTable("Latency, ms", note, ("", *shown)), latencies),
        TextTable("Totals", "" if comparison["same"] else of_each, (*heads, *columns), rows, labels=len(heads)),
    ]
    return [*tables, _client_table(comparison)] if comparison["clients"] else tables


def _client_table(comparison: Mapping[str, Any]) -> TextTable:
    clients = {
        (client, f"{of['requests']:,}"): [of[name] for name in JUDGED_LATENCIES]
        for client, of in comparison["clients"].items()
    }
    note = "" if comparison["same"] else "Of the requests that all completed."
    means = [latency_label("mean", name) for name in JUDGED_LATENCIES]
    return _latency_table(comparison, TextTable("By client, ms", note, ("", "requests", *means), labels=2), clients)


def _latency_table(comparison: Mapping[str, Any], of: TextTable, groups: Mapping[Any, Sequence[Values]]) -> TextTable:
    """For each group a row for each policy. The group's labels stand in the first of these rows.

    Args:
        comparison: what names the policies.
        of: the table without rows; policies come behind its labels, a difference behind each number.
        groups: values of each column by policy, by labels.
    """
    rows: list[tuple[str, ...]] = []
    for labels, values in groups.items():
        shown = labels
        for policy, side in _sides(comparison).items():
            rows.append((*shown, *side, *_with_differences(values, policy, comparison["policies"][0])))
            shown = ("",) * len(labels)
    heads = (*of.columns[: of.labels], *_heads(comparison))
    pairs = [text for column in of.columns[of.labels :] for text in (column, "")]
    return replace(of, columns=(*heads, *pairs), rows=rows, labels=len(heads))


def _is_known(values: Values) -> bool:
    return any(value is not None for value in values.values())


def _heads(comparison: Mapping[str, Any]) -> tuple[str, ...]:
    return ("",) if comparison["same"] else ("", "completed")


def _with_differences(values: Iterable[Values], policy: str, first: str) -> Iterator[str]:
    for of in values:
        yield number(of[policy])
        difference = None if policy == first else relative_difference(of[policy], of[first])
        yield "" if difference is None else signed(difference)


def _differences(comparison: Mapping[str, Any]) -> list[TextTable]:
    """Of two simulations; policies need not be compared step by step."""
    if "decisions" not in comparison:
        return []
    names, decisions = comparison["policies"], comparison["decisions"]
    rows = [(field, *(str(of[name]) for name in names)) for field, of in comparison["manifest_differences"].items()]
    alike = "" if rows else "Both were simulated with the same limits, policy and profile."
    steps, first = f"{decisions['steps']:,} steps", decisions["first_difference"]
    parting = f"Decisions part after {first['step']:,} of {steps}." if first else f"All {steps} are decided the same."
    return [
        TextTable("Fields that differ", alike, ("field", *names), rows, labels=3),
        difference_table("Decisions", parting, decisions, names),
    ]
