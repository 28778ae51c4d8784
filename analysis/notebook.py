"""Tandem from a notebook or a program: traces, simulations, runs, metrics, frames, comparisons.

The command line calls the same jobs. Paths are strings or `Path`s. Every mistake is a `TandemError` of one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from analysis.comparison import policies
from analysis.comparison.runs import check_roles
from analysis.jobs.compare import compare_runs
from analysis.jobs.limits import simulated_limits
from analysis.jobs.options import Comparing, Limits, RunOptions
from analysis.jobs.progress import Progress
from analysis.jobs.run import simulate_run
from analysis.metrics.names import REQUEST_LATENCIES
from analysis.metrics.summary import metrics, request_metrics
from engine.records.run_folder import RunRecords
from engine.records.run_folder import read_run as read_records
from engine.scheduler import POLICIES, Scheduler
from sim.profile.format import find_profile, read_profile
from traces.arrivals import assign_arrivals
from traces.errors import TandemError
from traces.synthetic import synthetic
from traces.trace import Trace, from_first_arrival, read_trace, write_trace

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Run",
    "TandemError",
    "Trace",
    "assign_arrivals",
    "compare",
    "compare_policies",
    "read_run",
    "read_trace",
    "simulate",
    "synthetic",
    "write_trace",
]


class _Notes(Progress):
    """Prints a job's notes, and nothing of its progress."""

    def note(self, text: str) -> None:
        """As in `Progress`."""
        print(text)


@dataclass(frozen=True, slots=True, repr=False)
class Run:
    """A run: its configuration, metrics and rows.

    Attributes:
        records: manifest, tables and summary, as they are on disk.
        folder: the folder of a run that was to be kept in none, which goes with the run; else None.
    """

    records: RunRecords
    folder: TemporaryDirectory[str] | None = None

    def __repr__(self) -> str:
        system, summary = self.records.manifest["system"], self.records.summary
        done = f"{summary['completed']:,} of {self.records.manifest['workload']['requests']:,} requests completed"
        means = ", ".join(
            f"{REQUEST_LATENCIES[name].label} {value:,.1f} ms"
            for name in ("ttft", "tpot", "e2el")
            if (value := summary[f"mean_{name}_ms"]) is not None
        )
        backend = self.records.manifest["provenance"]["backend"]
        return f"{system['scheduler']}, {backend}, {system['device']}\n{done}\nmean {means or 'latencies: none'}"

    def metrics(self, slos_ms: Mapping[str, float] | None = None) -> dict[str, int | float | None]:
        """As `analysis.metrics.summary.metrics`, such as `run.metrics({"ttft": 500, "tpot": 50})`."""
        return metrics(self.records, slos_ms)

    @property
    def requests(self) -> pd.DataFrame:
        """A row per request: the columns of `docs/reference.md`, and latencies such as `ttft_ms` where it completed."""
        import pandas as pd

        values = request_metrics(self.records)
        of_completed = pd.DataFrame(values).set_index("request").add_suffix("_ms")
        return self._frame("requests").join(of_completed, on="request")

    @property
    def steps(self) -> pd.DataFrame:
        """A row per step: the columns of `docs/reference.md`."""
        return self._frame("steps")

    def _frame(self, table: str) -> pd.DataFrame:
        frame: pd.DataFrame = self.records.tables[table].to_pandas()
        return frame


def read_run(folder: str | Path) -> Run:
    """Read a run that a command or `simulate` wrote. Raises TandemError if it is none, or damaged."""
    return Run(read_records(Path(folder)))


def simulate(
    trace: Trace | str | Path,
    policy: str | type[Scheduler] = "chunked_prefill",
    profile: str | Path = "h100-80gb/llama-3-8b",
    out: str | Path | None = None,
    overwrite: bool = False,
    check: bool = False,
    **limits: Any,
) -> Run:
    """Serve a trace in simulation. Limits that are not given are printed with their origin, and so are other notes.

    Args:
        trace: a trace, or its file.
        policy: a policy's name and parameters as on the command line, or a class.
        profile: one that ships, by name, or a folder.
        out: the run's folder; None: a temporary one.
        overwrite: whether a run in `out` is replaced.
        check: whether every step is checked.
        limits: fields of `engine.config.ServingConfig`, such as `max_seqs=64`.

    Raises:
        TandemError: a name, a limit, a file or the policy is bad.
    """
    try:
        said = Limits(scheduler=_name_of(policy), **limits)
    except TypeError as error:
        raise TandemError(f"no such limit ({error}): give {', '.join(Limits.__slots__)}") from None
    requests = trace if isinstance(trace, Trace) else from_first_arrival(read_trace(trace))
    times, notes = read_profile(find_profile(Path(profile))), _Notes()
    settled = simulated_limits(times, said)
    for note in requests.notes:
        notes.note(f"note: {note}")
    settled.say(notes)
    kept = None if out else TemporaryDirectory(prefix="tandem-")
    folder = Path(out) if out else Path(kept.name if kept else "") / "run"
    how = RunOptions(overwrite=overwrite, check=check, facts=settled.facts)
    return Run(simulate_run(requests, times, settled.config, folder, notes, options=how), kept)


def compare(
    simulated: Run,
    real: Run,
    profile: str | Path,
    out: str | Path,
    repeats: Sequence[Run] = (),
    ablate: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare a simulated run with a real one, as `tandem compare` does.

    Args:
        profile: of the simulated run.
        out: a folder that gets compare.json and report.html.
        repeats: further real runs of the trace, for the spread.
        ablate: terms of the latency model to leave out, one by one.

    Returns:
        The comparison; `analysis.comparison.compare.compare` says what is in it.

    Raises:
        TandemError: the runs are not of one workload and system, or not a simulated and a real one.
    """
    named = {"simulated": simulated.records, "real": real.records}
    again = {f"repeats[{place}]": each.records for place, each in enumerate(repeats)}
    runs = named | again
    check_roles(runs)
    times, how = read_profile(find_profile(Path(profile))), Comparing(ablate=list(ablate))
    return compare_runs([*runs.values()], times, Path(out), _Notes(), how)


def compare_policies(runs: Mapping[str, Run]) -> dict[str, Any]:
    """Set simulated runs of one trace side by side, by a name for each.

    Returns:
        The comparison; `analysis.comparison.policies.compare_policies` says what is in it.
    """
    return policies.compare_policies({name: run.records for name, run in runs.items()})


def _name_of(policy: str | type[Scheduler]) -> str:
    if isinstance(policy, str):
        return policy
    shipped = {each: name for name, each in POLICIES.items()}
    return shipped.get(policy) or f"{policy.__module__}:{policy.__qualname__}"
