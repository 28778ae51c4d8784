"""How far simulation can be believed on a machine: one profile, many loads, several policies, repeated real runs.

A study has two halves. `measure` needs the machine: it profiles it, finds its capacity, and serves every case for real,
leaving out what its folder holds already. `judge` needs the folder alone: it simulates, replays, compares and ranks.

    STUDY/profile, drift.json, capacity/, POLICY-LOAD/{trace.parquet, real, repeat-1, …, sim, compare.json, report.html}
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.comparison.attribution import LATENCIES
from analysis.comparison.compare import STATISTICS
from analysis.comparison.ranking import rank, ranking_tables
from analysis.jobs.compare import compare_runs
from analysis.jobs.files import write_json
from analysis.jobs.options import RunOptions
from analysis.jobs.profile import check_profile, drift_since, measure
from analysis.jobs.progress import Progress
from analysis.jobs.run import check_before, real_run, simulate_run
from analysis.report.caveats import beyond_sentence, sentences_by_run
from analysis.report.tables import TextTable, number, percent, signed
from engine.records import manifest
from engine.records.run_folder import RunRecords, read_run
from sim.profile.format import Profile, read_profile
from traces.arrivals import assign_arrivals
from traces.errors import TandemError
from traces.trace import Trace, read_trace, write_trace

if TYPE_CHECKING:
    from engine.config import ServingConfig
    from engine.executor.executor import Executor

BURST = 2000  # requests at once, whose throughput is the capacity
MODEL_TARGETS = {"decode": 0.02, "prefill": 0.03, "mixed": 0.03}  # MAPE of the latency model by kind of step
LATENCY_TARGETS = {"tpot": (0.02, 0.04), "e2el": (0.02, 0.04), "ttft": (0.05, 0.10)}  # allowed, and the most for spread
FULL_LOAD, FULL_TARGETS = 1.0, {"tpot": 0.05, "e2el": 0.05, "ttft": 0.10}  # at the capacity queueing amplifies


class Case(NamedTuple):
    """A policy under a load, a share of the capacity."""

    policy: str
    load: float

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.policy}-{round(100 * self.load)}"


@dataclass(frozen=True, slots=True)
class Study:
    """What to serve.

    Attributes:
        trace: requests, whose arrivals are replaced.
        policy: that serves all `loads`, and as many requests at once as tell the capacity.
        against: policies that serve `shared` loads too.
        shared: loads at which policies are ranked, and real runs of `policy` repeated.
        repeats: further real runs there.
        seconds: how long requests arrive.
        seed: of the arrivals.
    """

    trace: Trace
    policy: str
    loads: Sequence[float]
    against: Sequence[str]
    shared: Sequence[float]
    repeats: int
    seconds: float
    seed: int

    @property
    def cases(self) -> list[Case]:
        """All of them, those that are ranked first."""
        ranked = [Case(policy, load) for load in self.shared for policy in (self.policy, *self.against)]
        return [*dict.fromkeys([*ranked, *(Case(self.policy, load) for load in self.loads)])]

    @property
    def runs(self) -> Iterator[tuple[Case, str]]:
        """Every real run, in order: the ranked cases, then repeats with other cases between them.

        So repeats differ by as much as the machine drifts in a sitting, as the runs of different policies do.
        """
        ranked = [case for case in self.cases if case.load in self.shared]
        others = [case for case in self.cases if case not in ranked]
        yield from ((case, "real") for case in ranked)
        rounds = max(1, self.repeats)
        for turn in range(rounds):
            yield from ((case, "real") for case in others[turn::rounds])
            if turn < self.repeats:
                yield from ((case, f"repeat-{turn + 1}") for case in ranked if case.policy == self.policy)

    def arrivals(self, load: float, capacity: float) -> Trace:
        """The trace's requests at a share of the capacity. Raises TandemError if the trace has too few."""
        rate = load * capacity
        count = round(rate * self.seconds)
        if not 1 <= count <= len(self.trace.requests):
            raise TandemError(
                f"{self.seconds:g} s at {rate:.1f} requests a second are {count:,} requests, "
                f"the trace has {len(self.trace.requests):,}: give a longer --trace, or fewer --seconds"
            )
        first = replace(self.trace, requests=self.trace.requests[:count])
        return assign_arrivals(first, "poisson", rate=rate, seed=self.seed)


# -- with the machine ------------------------------------------------------------------------------------------


def measure_study(study: Study, executor: Executor, config: ServingConfig, out: Path, progress: Progress) -> None:
    """Profile the machine and serve every case for real, but for what `out` holds already.

    Raises:
        TandemError: a policy or folder is bad, the trace is too short, or the machine cannot be profiled.
    """
    for case in study.cases:
        check_before(replace(config, scheduler=case.policy), out / case.name / "real", overwrite=True)
    profile = _profile(executor, config, out / "profile", progress)
    capacity = _capacity(study, executor, replace(config, scheduler=study.policy), out / "capacity", progress)
    progress.note(f"capacity: {capacity:.1f} requests a second")
    for case, name in study.runs:
        if _is_whole(out / case.name / name):
            continue
        trace, folder = study.arrivals(case.load, capacity), out / case.name
        folder.mkdir(parents=True, exist_ok=True)
        write_trace(folder / "trace.parquet", trace)
        progress.note(f"{case.name}/{name}:")
        limits, options = replace(config, scheduler=case.policy), RunOptions(overwrite=True)
        real_run(trace, executor, limits, folder / name, progress, options)
    if not (out / "drift.json").exists():
        write_json(out / "drift.json", drift_since(profile, executor, progress))


def _profile(executor: Executor, config: ServingConfig, folder: Path, progress: Progress) -> Profile:
    if folder.exists():
        profile = read_profile(folder)
        check_profile(profile, executor, config)
        return profile
    folder.parent.mkdir(parents=True, exist_ok=True)
    return measure(executor, config, folder, progress)


def _capacity(study: Study, executor: Executor, config: ServingConfig, folder: Path, progress: Progress) -> float:
    if not _is_whole(folder):
        count = min(BURST, len(study.trace.requests))
        trace = assign_arrivals(replace(study.trace, requests=study.trace.requests[:count]), "all_at_once")
        progress.note("capacity:")
        real_run(trace, executor, config, folder, progress, RunOptions(overwrite=True))
    return float(read_run(folder).summary["request_throughput"])


def _is_whole(folder: Path) -> bool:
    return (folder / "manifest.json").exists() and not read_run(folder).partial


# -- with the folder alone -------------------------------------------------------------------------------------


def judge_study(out: Path, progress: Progress) -> dict[str, Any]:
    """Simulate and compare every case of a measured study, and rank the policies of each load.

    Returns:
        The content of `out`/fidelity.json: `cases` {name: {policy, load, comparison}}, `rankings` {load: ranking},
        `verdicts`: [{case, what, error, allowed, spread, within}], and the profile's held-out error and drift.

    Raises:
        TandemError: `out` holds no measured study.
    """
    found = sorted(out.glob("*/trace.parquet"))
    if not found:
        raise TandemError(f"{out} holds no measured study: make one with tandem fidelity measure")
    profile = read_profile(out / "profile")
    drift = json.loads((out / "drift.json").read_text()) if (out / "drift.json").exists() else None
    cases = {path.parent.name: _judge_case(path.parent, profile, drift, progress) for path in found}
    study = {
        "profile": {name: getattr(profile.meta, name) for name in ("device", "dtype", "held_out")},
        "drift": drift,
        "cases": cases,
        "rankings": _rankings(out, cases),
        "verdicts": [verdict for name, case in cases.items() for verdict in _verdicts(name, case)],
    }
    write_json(out / "fidelity.json", study)
    return study


def _judge_case(
    folder: Path, profile: Profile, drift: Mapping[str, float] | None, progress: Progress
) -> dict[str, Any]:
    real, *repeats = (read_run(path) for path in [folder / "real", *sorted(folder.glob("repeat-*"))])
    config = manifest.config_of(real.manifest)
    trace = read_trace(folder / "trace.parquet")
    simulate_run(trace, profile, config, folder / "sim", progress, real, RunOptions(overwrite=True))
    sim = read_run(folder / "sim")
    comparison = compare_runs(sim, real, repeats, profile, folder, progress, drift=drift)
    policy, _, load = folder.name.rpartition("-")
    return {"policy": policy, "load": int(load) / 100, "requests": len(real.tables["requests"]), "result": comparison}


def _rankings(out: Path, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    by_load: defaultdict[float, list[str]] = defaultdict(list)
    for name, case in cases.items():
        by_load[case["load"]].append(name)
    return {f"{load:.0%}": rank(_runs(out, names)) for load, names in sorted(by_load.items()) if len(names) > 1}


def _runs(out: Path, names: Sequence[str]) -> dict[str, RunRecords]:
    folders = [path for name in names for path in sorted((out / name).iterdir()) if (path / "manifest.json").exists()]
    return {f"{path.parent.name}/{path.name}": read_run(path) for path in folders}


def _verdicts(name: str, case: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    result, full = case["result"], case["load"] >= FULL_LOAD
    for kind, allowed in MODEL_TARGETS.items():
        if kind in result["latency_model"]:
            error = result["latency_model"][kind]["mape"]
            yield _verdict(name, f"latency model, {kind}", error, allowed, None)
    for latency, (usual, most) in LATENCY_TARGETS.items():
        for statistic in STATISTICS:
            error = result["closed_loop"][latency][statistic]["error"]
            spread = result["repeat_spread"][latency][statistic]
            allowed = FULL_TARGETS[latency] if full else max(usual, min(spread or 0.0, most))
            yield _verdict(name, f"{statistic} {LATENCIES[latency]}", error, allowed, spread)


def _verdict(case: str, what: str, error: float | None, allowed: float, spread: float | None) -> dict[str, Any]:
    within = None if error is None else abs(error) <= allowed
    return {"case": case, "what": what, "error": error, "allowed": allowed, "spread": spread, "within": within}


def study_tables(study: Mapping[str, Any]) -> list[TextTable]:
    """The latency model and the closed loop of every case, the rankings, and what is not within its target."""
    cases = sorted(study["cases"].values(), key=lambda case: (case["policy"], case["load"]))
    said = [sentence for name, case in study["cases"].items() for sentence in _caveats(name, case["result"])]
    before = [TextTable("Before the numbers", "\n".join(said), (), ())] if said else []
    tables = [*before, _model_table(cases), *(_closed_loop_table(cases, latency) for latency in LATENCIES)]
    for load, ranking in study["rankings"].items():
        tables += [replace(table, title=f"{load} load: {table.title}") for table in ranking_tables(ranking)]
    return [*tables, _verdict_table(study["verdicts"])]


def _caveats(name: str, result: Mapping[str, Any]) -> Iterator[str]:
    """Whom a case's runs did not serve, and what of it was extrapolated."""
    yield from (f"{name}, {sentence}" for sentence in sentences_by_run(result["not_completed"], result["asked"]))
    if beyond := beyond_sentence(result["coverage"]):
        yield f"{name}: {beyond[0].lower()}{beyond[1:]}"


def _model_table(cases: Sequence[Mapping[str, Any]]) -> TextTable:
    rows = []
    for case in cases:
        decisions, model = case["result"]["decisions"], case["result"]["latency_model"]
        known = [model.get(kind, {}) for kind in MODEL_TARGETS]
        errors = [f"{percent(of.get('mape'))} ({signed(of.get('mean_error'))})" for of in known]
        identical = "identical" if decisions["identical"] else "DIFFER"
        rows.append((*_label(case), identical, f"{decisions['steps']:,}", *errors))
    columns = ("policy", "load", "decisions", "steps", *MODEL_TARGETS)
    title = "Latency model: MAPE (mean error) of predicted against measured time of the same batches"
    return TextTable(title, "", columns, rows, labels=3)


def _closed_loop_table(cases: Sequence[Mapping[str, Any]], latency: str) -> TextTable:
    rows = []
    for case in cases:
        result = case["result"]
        pairs = [result["closed_loop"][latency][statistic] for statistic in STATISTICS]
        spreads = [result["repeat_spread"][latency][statistic] for statistic in STATISTICS]
        cells = [
            f"{number(pair['real'])} {signed(pair['error'])} ({percent(spread)})"
            for pair, spread in zip(pairs, spreads, strict=True)
        ]
        rows.append((*_label(case), *cells))
    title = f"Closed loop: {LATENCIES[latency]}: real ms, error, (spread of repeated real runs)"
    return TextTable(title, "", ("policy", "load", *STATISTICS), rows, labels=2)


def _label(case: Mapping[str, Any]) -> tuple[str, str]:
    return str(case["policy"]), f"{case['load']:.0%}"


def _verdict_table(verdicts: Sequence[Mapping[str, Any]]) -> TextTable:
    judged = [verdict for verdict in verdicts if verdict["within"] is not None]
    outside = [verdict for verdict in judged if not verdict["within"]]
    rows = [
        (each["case"], each["what"], signed(each["error"]), percent(each["allowed"]), percent(each["spread"]))
        for each in outside
    ]
    note = f"{len(judged) - len(outside)} of {len(judged)} errors are within what is allowed."
    return TextTable("Not within what is allowed", note, ("case", "what", "error", "allowed", "spread"), rows, labels=2)
