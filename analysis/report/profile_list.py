"""The profiles that ship, listed: whose measurements they are, and how well they predict points left out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.report.tables import TextTable, percent
from sim.profile.format import TABLES, read_meta, shipped_profiles

MEASURED = [table for table in TABLES if table != "host"]


def shelf() -> list[dict[str, Any]]:
    """A row for each profile that ships; `held_out` as in its meta.yaml."""
    return [_row(name, folder) for name, folder in shipped_profiles().items()]


def _row(name: str, folder: Path) -> dict[str, Any]:
    meta = read_meta(folder / "meta.yaml")
    return {
        "profile": name,
        "gpu": meta.device,
        "model": meta.model.name,
        "dtype": meta.dtype,
        "kernels": meta.kernels or "none",
        "source": meta.source,
        "held_out": meta.held_out or {},
        "kib": round(sum(file.stat().st_size for file in folder.iterdir()) / 1024, 1),
    }


def shelf_tables(rows: list[dict[str, Any]]) -> list[TextTable]:
    """The rows of `shelf` for people."""
    columns = ("profile", "gpu", "model", "dtype", "kernels", "kib")
    sources = [f"{row['profile']}: {row['source']}" for row in rows]
    what = [[str(row[column]) for column in columns] for row in rows]
    errors = [
        [row["profile"], *(_error(row["held_out"], table) for table in MEASURED), _whole(row["held_out"])]
        for row in rows
    ]
    return [
        TextTable(
            "Profiles that ship",
            "\n".join(["Simulate on one with --profile PROFILE.", *sources]),
            columns,
            what,
            labels=5,
        ),
        TextTable(
            "Held-out error",
            "Of tables: median / P95 of points left out in turn; attention along its context, or (*) across chunks if\n"
            "no context was measured. Of whole steps: MAPE on batches that are in no table.",
            ("profile", *(table.replace("_", " ") for table in MEASURED), "whole steps"),
            errors,
        ),
    ]


def _error(held_out: dict[str, Any], table: str) -> str:
    of_table = held_out.get(table, {})
    mark = "" if "along" in of_table or "across" not in of_table else "*"
    found = of_table.get("along") or of_table.get("across") or of_table
    return f"{percent(found['median'])} / {percent(found['p95'])}{mark}" if found else percent(None)


def _whole(held_out: dict[str, Any]) -> str:
    return percent(held_out.get("mape"))
