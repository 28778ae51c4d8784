"""Two simulations side by side: latencies, totals, what they differ in, and the first step at which decisions part.

It compares records with records. Nothing in it is measured, and it says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from analysis.comparison.compare import compare_decisions, flatten_manifest, manifest_differences
from analysis.comparison.policies import compare_policies, policy_tables, write_policy_page
from analysis.report.tables import TextTable, amount
from engine.records.run_folder import RunRecords

UNMEASURED = "Two simulations: nothing here is measured."
_COMPARED = ("profile", "source", "commit")  # of provenance, which two simulations may well differ in


def compare_simulations(
    first: tuple[str, RunRecords], second: tuple[str, RunRecords], allow_different: Collection[str] = ()
) -> dict[str, Any]:
    """Set two simulations of one workload side by side.

    Args:
        first, second: name and run; differences are to the first.
        allow_different: manifest fields of the workload in which they may differ.

    Returns:
        As `analysis.comparison.policies.compare_policies`, by name, and `manifest_differences`: {field: {name: value}};
        `decisions`: as `analysis.comparison.compare.compare_decisions`, by name.

    Raises:
        TandemError: the workloads differ in a field that is not allowed to.
    """
    runs = dict((first, second))
    allowed = {"system", *allow_different}  # to see what a limit or policy is worth is why one compares
    differences = manifest_differences(first[1], dict((second,)), allowed, reference=first[0])
    return compare_policies(runs) | {
        "manifest_differences": differences | _provenance(runs),
        "decisions": compare_decisions(first[1], second[1], (first[0], second[0])),
    }


def _provenance(runs: Mapping[str, RunRecords]) -> dict[str, dict[str, Any]]:
    flat = {name: flatten_manifest(run, ("provenance",)) for name, run in runs.items()}
    fields = {f"provenance.{field}" for field in _COMPARED}
    values = {field: {name: of.get(field) for name, of in flat.items()} for field in sorted(fields)}
    return {field: of for field, of in values.items() if len({*of.values()}) > 1}


def simulation_tables(comparison: Mapping[str, Any]) -> list[TextTable]:
    """What they are, then latencies and totals, fields that differ, and where decisions part."""
    return [TextTable(UNMEASURED, "", (), ()), *policy_tables(comparison), *_differences(comparison)]


def _differences(comparison: Mapping[str, Any]) -> list[TextTable]:
    names, fields = comparison["policies"], comparison["manifest_differences"]
    rows = [(field, *(str(of[name]) for name in names)) for field, of in fields.items()]
    alike = "" if rows else "Both were simulated with the same limits, policy and profile."
    return [TextTable("What they differ in", alike, ("field", *names), rows, labels=3), _parting(comparison)]


def _parting(comparison: Mapping[str, Any]) -> TextTable:
    decisions, names = comparison["decisions"], comparison["policies"]
    first = decisions["first_difference"]
    if first is None:
        return TextTable("Decisions", f"All {decisions['steps']:,} steps are decided the same.", (), ())
    compared = {"digest": {name: first[name] for name in names}} | first["columns"]
    rows = [(name, *(amount(of[run]) for run in names)) for name, of in compared.items()]
    note = f"Decisions part after {first['step']:,} of {decisions['steps']:,} steps."
    return TextTable("Decisions", note, ("at the first difference", *names), rows)


def write_simulation_page(comparison: Mapping[str, Any], runs: Mapping[str, RunRecords], path: Path) -> None:
    """Write it as one self-contained HTML page. Raises TandemError if it cannot be written."""
    title = f"{' and '.join(comparison['policies'])}: two simulations"
    write_policy_page(comparison, runs, path, title, UNMEASURED, _differences(comparison))
