"""The remaining error of the latency model in a study's real runs, and its causes.

    python docs/examples/residuals.py STUDY

STUDY is a folder that `tandem fidelity measure` filled. Every real run is replayed on the study's profile. Its steps
then have a measured and a predicted time. The program looks for three causes:

- A GPU at its power limit is slower the more it computed just before.
- A table of captured sizes has the same error at the same size in every run.
- A device that idles waited for its host.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from analysis.metrics.columns import Floats, Ints, column, step_kinds
from analysis.report.tables import TextTable, number, print_tables, signed
from engine.model.graph_sizes import GraphSizes
from engine.records.manifest import config_of
from engine.records.run_folder import read_run
from sim.profile.format import Profile, read_profile
from sim.replay import replay

MEMORIES_MS = (5, 10, 20, 40, 80, 160, 320, 640)
COMPUTE_BOUND = (500, 1100)  # tokens of steps that prefill; most such steps of a run have about as many
FEWEST = 30  # steps, below which a figure may be chance


class Steps(NamedTuple):
    """The steps of a real run. Every array has one entry a step, (steps,). Times are in microseconds."""

    start: Floats
    measured: Floats
    predicted: Floats
    launch: Floats
    tokens: Ints
    decodes: Ints
    prefills: np.ndarray

    @property
    def error(self) -> Floats:
        """(predicted - measured) / measured."""
        return self.predicted / self.measured - 1

    @property
    def compute_bound(self) -> np.ndarray:
        """Whether a step prefills and has `COMPUTE_BOUND` tokens, (steps,)."""
        return self.prefills & (self.tokens >= COMPUTE_BOUND[0]) & (self.tokens < COMPUTE_BOUND[1])


def read_steps(folder: Path, profile: Profile) -> Steps:
    """Replay a real run. Returns its steps that compute."""
    run = read_run(folder)
    steps, replayed = run.tables["steps"], replay(run, config_of(run.manifest), profile)
    computes = step_kinds(steps) != "swap"

    def us(name: str) -> Floats:
        return column(steps, name)[computes] / 1000

    decodes, prefill_tokens = (column(steps, f"{kind}_tokens")[computes] for kind in ("decode", "prefill"))
    return Steps(
        start=us("device_start_ns"),
        measured=us("device_ns"),
        predicted=replayed.predicted_ns[computes] / 1000,
        launch=us("launched_ns") - us("planned_ns"),
        tokens=decodes + prefill_tokens,
        decodes=decodes,
        prefills=prefill_tokens > 0,
    )


def study_steps(study: Path) -> dict[str, Steps]:
    """The steps of the first real run of every case, by policy and load."""
    profile = read_profile(study / "profile")
    cases = sorted((path.parent for path in study.glob("*/real/manifest.json")), key=_policy_and_load)
    return {folder.parent.name: read_steps(folder, profile) for folder in cases}


def _policy_and_load(folder: Path) -> tuple[str, int]:
    policy, _, load = folder.parent.name.rpartition("-")
    return policy, int(load)


def recent_rate(steps: Steps, memory_ms: float) -> Floats:
    """Tokens per microsecond that the device computed before each step, (steps,).

    The rate is a mean over the past. Work that lies `memory_ms` back counts e times less. An idle device computes none.
    """
    rates, rate, free = np.zeros(len(steps.start)), 0.0, float(steps.start[0])
    columns = zip(steps.start.tolist(), steps.measured.tolist(), steps.tokens.tolist(), strict=True)
    for step, (start, time, tokens) in enumerate(columns):
        rates[step] = rate = rate * np.exp(-max(start - free, 0) / 1000 / memory_ms)
        kept = np.exp(-time / 1000 / memory_ms)
        rate, free = rate * kept + (1 - kept) * tokens / time, start + time
    return rates


def memory_correlation(steps: Steps, memory_ms: float) -> float | None:
    """Correlation of measured / predicted time of compute-bound steps with the rate before them. None of too few."""
    chosen = steps.compute_bound
    if chosen.sum() < FEWEST:
        return None
    longer = steps.measured[chosen] / steps.predicted[chosen]
    return float(np.corrcoef(recent_rate(steps, memory_ms)[chosen], longer)[0, 1])


def idle_us(steps: Steps) -> Floats:
    """The idle time of the device before each step except the first, (steps - 1,)."""
    return np.maximum(0.0, steps.start[1:] - np.maximum.accumulate(steps.start + steps.measured)[:-1])


def by_captured_size(steps: Steps, sizes: GraphSizes) -> dict[int, float]:
    """The mean error of steps that only decode, by the rows of their captured step."""
    alone = ~steps.prefills
    rows = np.array([sizes.rows(count, 0) or 0 for count in steps.decodes[alone]])
    errors = steps.error[alone]
    chosen = {int(size): rows == size for size in np.unique(rows)}
    return {size: float(errors[here].mean()) for size, here in chosen.items() if here.sum() >= FEWEST}


# -- tables ----------------------------------------------------------------------------------------------------


def _mean_error(steps: Steps, chosen: np.ndarray) -> str:
    return signed(float(steps.error[chosen].mean())) if chosen.sum() >= FEWEST else signed(None)


def _error_table(cases: dict[str, Steps]) -> TextTable:
    def row(name: str, steps: Steps) -> tuple[str, ...]:
        middle = steps.prefills & (steps.tokens >= 512) & (steps.tokens < 1024)
        return name, *(_mean_error(steps, chosen) for chosen in (~steps.prefills, steps.prefills, middle))

    columns = ("case", "decode", "with prefill", "of 512-1,023 tokens")
    return TextTable("Mean error of the latency model", "", columns, [row(*case) for case in cases.items()])


def _memory_table(cases: dict[str, Steps]) -> TextTable:
    def row(name: str, steps: Steps) -> tuple[str, ...]:
        return name, *(number(memory_correlation(steps, memory_ms)) for memory_ms in MEMORIES_MS)

    title = "Correlation of measured / predicted with the tokens per microsecond computed before"
    columns = ("memory, ms", *map(str, MEMORIES_MS))
    low, high = COMPUTE_BOUND
    note = f"Steps that prefill, of {low} to {high - 1:,} tokens."
    return TextTable(title, note, columns, [row(*case) for case in cases.items()])


def _size_table(cases: dict[str, Steps], sizes: GraphSizes) -> TextTable:
    errors = {name: by_captured_size(steps, sizes) for name, steps in cases.items()}
    rows = [
        (f"{size}", *(signed(of_case.get(size)) for of_case in errors.values()))
        for size in sizes.decode
        if any(size in of_case for of_case in errors.values())
    ]
    columns = ("rows", *errors)
    return TextTable("Mean error of decode steps, by rows of the captured step", "", columns, rows)


def _host_table(cases: dict[str, Steps]) -> TextTable:
    def row(name: str, steps: Steps) -> tuple[str, ...]:
        idle, launch = idle_us(steps) / 1000, steps.launch / 1000
        span_s = (steps.start[-1] + steps.measured[-1] - steps.start[0]) / 1e6
        found = (idle.sum(), np.median(idle), idle.max(), np.median(launch), np.percentile(launch, 99), launch.max())
        return name, f"{span_s:.1f}", f"{found[0]:.1f}", f"{found[1]:.4f}", *(f"{each:.2f}" for each in found[2:])

    columns = ("case", "run, s", "idle, ms", "a step", "longest", "launch p50", "p99", "longest")
    note = "Idle: between two steps, waits for arrivals included. Launch: the host's time, ms."
    return TextTable("The device between steps", note, columns, [row(*case) for case in cases.items()])


def tables(study: Path) -> Iterator[TextTable]:
    """All tables. The table by captured size exists only if the profile is of captured steps."""
    cases, graphs = study_steps(study), read_profile(study / "profile").meta.graphs
    yield from (_error_table(cases), _memory_table(cases))
    if graphs:
        yield _size_table(cases, graphs)
    yield _host_table(cases)


if __name__ == "__main__":
    print_tables(tables(Path(sys.argv[1])), Console(width=180))
