"""What every page says above its numbers: model, GPU, trace and date of the runs, as their manifests have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from engine.records.run_folder import RunRecords


def run_facts(runs: Mapping[str, RunRecords]) -> dict[str, str]:
    """Label -> value. What no manifest says is left out; values that differ stand side by side.

    Args:
        runs: by name, or by `measured` and `simulated`.
    """
    workloads, systems, origins = (
        [run.manifest.get(part, {}) for run in runs.values()] for part in ("workload", "system", "provenance")
    )
    digests = [str(of["trace"])[:12] for of in workloads if "trace" in of]
    facts = {
        "model": _alike(" ".join(map(str, filter(None, (of.get("model"), of.get("dtype"))))) for of in workloads),
        "device": _alike(of.get("device") for of in systems),
        "trace": _alike(digests),
        "requests": _alike(f"{of['requests']:,}" for of in workloads if "requests" in of),
        "date": _dates(dict(zip(runs, (of.get("date") for of in origins), strict=True))),
    }
    return {label: value for label, value in facts.items() if value}


def _alike(values: Iterable[Any]) -> str:
    return " / ".join(dict.fromkeys(str(value) for value in values if value))


def _dates(dates: Mapping[str, str | None]) -> str:
    """When each of two runs was made; of more, the first and the last."""
    known = {name: datetime.fromisoformat(date).strftime("%Y-%m-%d %H:%M UTC") for name, date in dates.items() if date}
    if len(dates) == 2 and len({*known.values()}) == 2:
        return ", ".join(f"{date} ({name})" for name, date in known.items())
    return " to ".join(dict.fromkeys((min(known.values()), max(known.values())))) if known else ""
