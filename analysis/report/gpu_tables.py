"""Tables about a GPU: the terms of its memory, and how far it has moved from its profile."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from analysis.report.tables import TextTable, percent, signed
from engine.config import ServingConfig
from engine.model.config import ModelConfig
from sim.memory_model import Memory, check_fits
from sim.sources.roofline import data_sheet

TERMS = {
    "usable": "90 % of the GPU",
    "context": "CUDA with its kernels loaded, and cuBLAS's workspace",
    "weights": "of the model",
    "buffers": "a step's packed integers",
    "step": "what the largest step holds at once",
    "graphs": "the largest captured step's, and the nodes of all",
}


def gpu_memory(hardware: str, model: ModelConfig, dtype: str, config: ServingConfig) -> dict[str, Any]:
    """The terms of a GPU's memory in bytes, and the KV blocks that it holds.

    Raises:
        TandemError: no such GPU, or not even one request fits.
    """
    sheet = data_sheet(hardware)
    memory = Memory.of(sheet.memory_gib, model, dtype, config)
    check_fits(memory, f"{model.name} {dtype} on {sheet.device}", config)
    return asdict(memory) | {"room": memory.room, "kv_blocks": memory.blocks}


def memory_table(terms: dict[str, Any], title: str) -> TextTable:
    """What `gpu_memory` found, for people."""
    rows = [(name, what, f"{'' if name == 'usable' else '-'}{_gib(terms[name])}") for name, what in TERMS.items()]
    held = terms["room"] // terms["block"]
    rows.append(("KV cache", f"{held:,} blocks of {terms['block'] / 2**20:g} MiB", _gib(terms["room"])))
    bound = ", the most that they can use" if terms["most"] < held else ""
    note = f"Within these limits a run gets {terms['kv_blocks']:,} KV blocks{bound}."
    return TextTable(title, note, ("term", "what it is", "GiB"), rows, labels=2)


def drift_table(report: dict[str, Any]) -> TextTable:
    """What `sim.profiling.drift.drift_report` says, for people."""
    rows = []
    for each in report["tables"]:
        errors = signed(each["median"]), f"±{percent(each['error'])}", signed(each["worst"])
        at = ", ".join(f"{name} {value}" for name, value in each["at"].items())
        rows.append((each["table"], each["verdict"], str(each["points"]), *errors, at))
    title = f"Drift: measured now on {report['device']}, against the profile of {report['profiled']}"
    columns = ("table", "verdict", "points", "median", "2 std errors", "worst", "at")
    return TextTable(title, report["why"], columns, rows, labels=2)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"
