"""Negative controls: small falsifications of a recorded run that its replay must notice.

A check that cannot fail proves nothing. Each control changes one input of a decision, so that equal digests
afterwards would mean that digests, or the replay, are blind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pyarrow as pa

from engine.config import ServingConfig
from engine.records.run_folder import RunRecords
from sim.replay import replay

TRIES = 20
TIMES = ("now_ns", "planned_ns", "launched_ns", "completed_ns")


def negative_controls(run: RunRecords, config: ServingConfig) -> dict[str, bool | None]:
    """Falsify a run in two ways and replay it.

    Returns:
        `arrival_moved`: one arrival's delivery moved across the point where it was admitted. `step_longer`: one step
        made longer, so that an arrival falls before a decision that it came after; whether the policy then decides
        otherwise depends on it, so several are tried. True where a replay decides otherwise, False where none does,
        None where no request was admitted as soon as it came, so that there is nothing to move.
    """
    reads = run.tables["iterations"]["now_ns"].to_pylist()
    candidates = list(islice(_admitted_at_once(run), TRIES))
    moved = (_with_delivery(run, row, reads[turn] + 1) for row, turn in candidates)
    longer = (_delayed(run, row, turn - 1, reads[turn] - reads[turn - 1]) for row, turn in candidates)
    return {
        "arrival_moved": any(_differs(run, each, config) for each in moved) if candidates else None,
        "step_longer": any(_differs(run, each, config) for each in longer) if candidates else None,
    }


def _admitted_at_once(run: RunRecords) -> Iterator[tuple[int, int]]:
    """Requests that were scheduled when delivered, while others ran, last first: row, and turn of the loop."""
    requests = run.tables["requests"].select(["delivered_ns", "first_scheduled_ns"]).to_pylist()
    launched = run.tables["iterations"]["step"].to_pylist()
    turns = {now: turn for turn, now in enumerate(run.tables["iterations"]["now_ns"].to_pylist())}
    for row, request in reversed(list(enumerate(requests))):
        turn = turns.get(request["delivered_ns"], 0)
        at_once = request["delivered_ns"] == request["first_scheduled_ns"]
        if turn > 0 and at_once and launched[turn - 1] is not None:
            yield row, turn


def _with_delivery(run: RunRecords, row: int, delivered_ns: int) -> RunRecords:
    delivered = run.tables["requests"]["delivered_ns"].to_pylist()
    delivered[row] = delivered_ns
    return _with_columns(run, "requests", {"delivered_ns": delivered})


def _delayed(run: RunRecords, row: int, first_turn: int, delay_ns: int) -> RunRecords:
    """Everything from a turn of the loop on happens later, as if the step before it had taken longer; but one request
    is delivered when it was."""
    table = run.tables["iterations"]
    first_ns, delivered = table["now_ns"][first_turn].as_py(), run.tables["requests"]["delivered_ns"].to_pylist()
    later = [time + delay_ns if time >= first_ns and each != row else time for each, time in enumerate(delivered)]
    run = _with_columns(run, "requests", {"delivered_ns": later})
    columns = {name: table[name].to_pylist() for name in TIMES}
    for times in columns.values():
        times[first_turn:] = [None if time is None else time + delay_ns for time in times[first_turn:]]
    return _with_columns(run, "iterations", columns)


def _with_columns(run: RunRecords, name: str, columns: dict[str, list[int | None]]) -> RunRecords:
    table = run.tables[name]
    for column, values in columns.items():
        table = table.set_column(table.column_names.index(column), column, pa.array(values, pa.int64()))
    return replace(run, tables={**run.tables, name: table})


def _differs(run: RunRecords, falsified: RunRecords, config: ServingConfig) -> bool:
    return not replay(falsified, config).records.tables["steps"]["digest"].equals(run.tables["steps"]["digest"])
