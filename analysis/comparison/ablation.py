"""The worth of each term of the latency model: a recorded run is predicted again with that term left out.

The open loop asks the model about the recorded run's own batches. The closed loop serves its workload anew, under the
same limits and policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from analysis.comparison.compare import closed_loop_errors, compare_decisions, latency_model_errors
from analysis.comparison.runs import common_requests
from analysis.metrics.names import JUDGED_LATENCIES
from engine.config import ServingConfig
from engine.records import manifest
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from sim.latency_model import PARTS
from sim.profile.format import Profile
from sim.replay import Replay, recorded_requests
from sim.simulate import predict
from traces.errors import TandemError

Told = Callable[[int], None]  # a number, as it grows
KV_BLOCKS = "kv-blocks"
TERMS = {
    "host": "host",
    "imbalance": "imbalance",
    "head": "head",
    "graph-padding": "padding",
    "power": "power",
    KV_BLOCKS: None,
}
"""What can be left out -> what `sim.simulate` calls it. `kv-blocks` is no term of the latency model: without it, a
naive model of memory gives the number of KV blocks. `imbalance` is that of the contexts."""
FULL = "full"


def read_terms(given: Sequence[str], profile: Profile) -> list[str]:
    """Terms given one by one or with commas between, each once.

    Raises:
        TandemError: there is no such term, or the profile lacks the data for it.
    """
    terms = list(dict.fromkeys(term.strip() for each in given for term in each.split(",")))
    if unknown := [term for term in terms if term not in TERMS]:
        raise TandemError(f"--ablate: no term '{unknown[0]}': choose from {', '.join(TERMS)}")
    if KV_BLOCKS in terms:
        naive_blocks(profile)
    return terms


def naive_blocks(profile: Profile) -> int:
    """KV blocks where all usable memory less the weights holds them: no activations, no captured graphs.

    Raises:
        TandemError: the profile does not say.
    """
    memory = profile.meta.memory
    if memory is None:
        raise TandemError(
            f"--ablate {KV_BLOCKS}: this profile does not say what memory the GPU has; measure it again, or leave "
            f"{KV_BLOCKS} out"
        )
    return (memory.usable - memory.weights) // memory.block


def ablate(
    real: RunRecords, replayed: Replay, profile: Profile, terms: Sequence[str], progress: Told = lambda _: None
) -> dict[str, Any]:
    """Predict a recorded run with the full model, and again without each of `terms`.

    Args:
        real: the recorded run.
        replayed: its replay on `profile`.
        profile: of the latency model.
        terms: names of `TERMS`.
        progress: told how many of the `len(terms) + 1` models are done.

    Returns:
        {`full` or term: {`num_blocks`, `latency_model`: {kind of step: {steps, mape, mean_error}}, `closed_loop`:
        {ttft, tpot, e2el: error of the mean, or None}}}; errors are fractions, (predicted - real) / real.

    Raises:
        TandemError: the profile lacks the data for a term.
    """
    config, results = manifest.config_of(real.manifest), {}
    decisions = compare_decisions(real, replayed.records)
    for done, term in enumerate((FULL, *terms), 1):
        limits = replace(config, num_blocks=naive_blocks(profile)) if term == KV_BLOCKS else config
        ignore = [part] if (part := TERMS.get(term)) else []
        predicted_ns = replayed.without_ns(part) if part and part in PARTS else replayed.predicted_ns
        results[term] = {
            "num_blocks": limits.num_blocks,
            "latency_model": latency_model_errors(real, predicted_ns, decisions),
            "closed_loop": _closed_loop(real, limits, profile, ignore),
        }
        progress(done)
    return results


def _closed_loop(
    real: RunRecords, config: ServingConfig, profile: Profile, ignore: Sequence[str]
) -> dict[str, float | None]:
    recorder = Recorder()
    predict(recorded_requests(real), config, profile, recorder, ignore)
    sim = RunRecords(real.manifest, recorder.tables())
    errors = closed_loop_errors(sim, real, common_requests(sim, real))
    return {name: errors[name]["mean"]["error"] for name in JUDGED_LATENCIES}
