"""The profiles that ship, listed: whose measurements they are, and how well they predict points left out of them."""

from __future__ import annotations

from typing import Any

from analysis.report.tables import TextTable, percent
from sim.profile.format import TABLES, read_meta, shipped_profiles

MEASURED = [table for table in TABLES if table != "host"]
COLUMNS = ("profile", "gpu", "model", "dtype", "kernels")


def list_profiles() -> list[dict[str, Any]]:
    """A row for each profile that ships; `held_out` as in its meta.yaml."""
    rows = []
    for name, folder in shipped_profiles().items():
        meta, size = read_meta(folder / "meta.yaml"), sum(file.stat().st_size for file in folder.iterdir())
        shape = {"profile": name, "gpu": meta.device, "model": meta.model.name, "dtype": meta.dtype}
        made = {"kernels": meta.kernels or "none", "source": meta.source, "held_out": meta.held_out or {}}
        rows.append(shape | made | {"kib": round(size / 1024, 1)})
    return rows


def profile_tables(profiles: list[dict[str, Any]]) -> list[TextTable]:
    """The rows of `list_profiles` for people."""
    sources = [f"{profile['profile']}: {profile['source']}" for profile in profiles]
    note = "\n".join(["Simulate on one with --profile PROFILE.", *sources])
    rows = [[str(profile[column]) for column in COLUMNS] for profile in profiles]
    held_out = (
        "Of tables: median / P95 of points left out in turn; attention along its context, or (*) across chunks if "
        "no context was measured. Of whole steps: MAPE on batches that are in no table."
    )
    columns = ("profile", *(table.replace("_", " ") for table in MEASURED), "whole steps")
    errors = [[profile["profile"], *_errors(profile["held_out"])] for profile in profiles]
    return [
        TextTable("Profiles that ship", note, COLUMNS, rows, labels=5),
        TextTable("Held-out error", held_out, columns, errors),
    ]


def _errors(held_out: dict[str, Any]) -> list[str]:
    return [*(_error(held_out.get(table, {})) for table in MEASURED), percent(held_out.get("mape"))]


def _error(of_table: dict[str, Any]) -> str:
    star = "" if "along" in of_table or "across" not in of_table else "*"
    found = of_table.get("along") or of_table.get("across") or of_table
    return f"{percent(found['median'])} / {percent(found['p95'])}{star}" if found else percent(None)
