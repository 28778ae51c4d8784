"""Sentences that come before any number: requests that were not served, extrapolation, and the state of the machine.

The counts come from `analysis.metrics.summary`, the latency model and `analysis.jobs.machine_watch`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from analysis.metrics.names import P99_REQUESTS
from engine.request import CANCELLED, FAILED, REJECTED

LOUD = 0.02  # shares of the CPUs from which something is worth naming
NOTHING_COMPLETED = "No request completed: there are no latencies."

# A scheduler's reason to reject -> for people, with the largest and the limit, and which option helps.
_REASONS = {
    r"prompt \+ max_tokens is (\d+), max_model_len (\d+)": "prompt + max_tokens above --max-model-len ({limit:,}); "
    "the longest is {most:,}: raise it to {most}, or leave these out",
    r"needs (\d+) KV blocks, there are (\d+)": "longer than all KV blocks ({limit:,}); the longest needs {most:,}: "
    "raise --kv-blocks to {most}, or leave these out",
    r"a prefill of up to (\d+) tokens exceeds max_batched_tokens (\d+)": "a prefill above --max-batched-tokens "
    "({limit:,}), which this policy does not split; the longest is {most:,}: raise it to {most}, or take a policy that "
    "chunks (`chunked = True`)",
    r"token id (-?\d+) is not in the model's vocabulary, which has (\d+)": "tokens that the model lacks, such as "
    "{most}, for it has {limit:,}: make the trace with its tokenizer",
}
_NO_REASON = {
    CANCELLED: "their clients gave up",
    REJECTED: "without a reason on record",
    "unfinished": "in the system when the records end",
    "not delivered": "the run ended before they came",
}


def completed_sentences(summary: Mapping[str, Any], asked: int) -> Iterator[str]:
    """The fate of the requests that did not complete, the option that would help, and the scope of the latencies.

    Args:
        summary: of a run, with `completed` and `not_completed`.
        asked: how many requests were to be served.
    """
    yield from missing_sentences(summary["not_completed"], asked)
    if not summary["completed"]:
        yield NOTHING_COMPLETED
    elif summary["not_completed"]:
        yield f"Latencies are of the {summary['completed']:,} that completed."


def missing_sentences(groups: Sequence[Mapping[str, Any]], asked: int) -> Iterator[str]:
    """A sentence for each group of `analysis.metrics.summary.not_completed`."""
    for group in groups:
        count, outcome = group["requests"], group["outcome"]
        was = "" if outcome == FAILED else "was " if count == 1 else "were "
        yield f"{count:,} of {asked:,} requests {was}{outcome}: {_reason(outcome, group['reason'])}."


def sentences_by_run(not_completed: Mapping[str, Sequence[Mapping[str, Any]]], asked: int) -> Iterator[str]:
    """As `missing_sentences`, of several runs by name, those alike in one sentence."""
    alike: dict[str, list[str]] = {}
    for name, groups in not_completed.items():
        alike.setdefault(str(groups), []).append(name)
    for names in alike.values():
        for sentence in missing_sentences(not_completed[names[0]], asked):
            yield f"{', '.join(names)}: {sentence}"


def _reason(outcome: str, reason: str | None) -> str:
    if reason is None:
        return _NO_REASON[outcome]
    for pattern, words in _REASONS.items():
        if found := re.search(pattern, reason):
            return words.format(most=int(found[1]), limit=int(found[2]))
    return reason.rstrip(".")


def p99_sentence(requests: int) -> str:
    """Why there is no P99, or nothing."""
    return f"P99 is shown from {P99_REQUESTS} requests up." if 0 < requests < P99_REQUESTS else ""


def beyond_sentence(coverage: Mapping[str, Any] | None) -> str:
    """The extrapolated shares of a prediction by table, in one line; nothing if all was measured.

    Args:
        coverage: as `sim.latency_model.LatencyModel.coverage`, or None where it is not on record.
    """
    tables = [_beyond(table, of) for table, of in (coverage or {}).get("beyond", {}).items()]
    return f"Beyond the profile: {'; '.join(tables)}." if tables else ""


def beyond_sentences(coverages: Mapping[str, Mapping[str, Any] | None]) -> Iterator[str]:
    """As `beyond_sentence`, of several runs by name."""
    for name, coverage in coverages.items():
        if beyond := beyond_sentence(coverage):
            yield f"{name}: {beyond[0].lower()}{beyond[1:]}"


def _beyond(table: str, of: Mapping[str, Any]) -> str:
    shares = f"{_share(of['lookups'])} of its look-ups, {_share(of['device_time'])} of the device time"
    where = ", ".join(filter(None, (_off(axis, **ends) for axis, ends in of["axes"].items())))
    return f"{table.replace('_', ' ')} {shares} ({where or 'between what was measured'})"


def _share(fraction: float) -> str:
    return "below 0.1 %" if 0 < fraction < 0.001 else f"{100 * fraction:.3g} %"


def _off(axis: str, asked: Sequence[float], measured: Sequence[float]) -> str:
    """How far a look-up lies beyond the measured range along an axis."""
    if asked[1] > measured[1]:
        return f"{axis} to {asked[1]:,.0f}, measured to {measured[1]:,.0f}"
    return f"{axis} from {asked[0]:,.0f}, measured from {measured[0]:,.0f}" if asked[0] < measured[0] else ""


def seen_sentences(machines: Mapping[str, Mapping[str, Any] | None]) -> Iterator[str]:
    """The state of the machine during each of several runs.

    Args:
        machines: by the run's name, as `analysis.jobs.machine_watch` has seen it; None where nothing is on record.
    """
    for name, seen in machines.items():
        yield f"During {name}: {_words(seen) if seen else 'not recorded what else the machine did'}."


def _words(seen: Mapping[str, Any]) -> str:
    shares = {"other processes took": seen["others"], "the hypervisor took (steal)": seen["steal"]}
    told = [f"{who} {share:.0%} of the CPU time" for who, share in shares.items() if share and share >= LOUD]
    load = [each for each in seen["load_average"] if each is not None]
    if load:
        told.append(f"load average up to {max(load):.1f} on {seen['cores']} cores")
    return ", ".join(told) or "nothing to see on the CPUs"
