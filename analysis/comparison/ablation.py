"""What each term of the latency model is worth: a recorded run is predicted again with that term left out.

The open loop asks the model about the recorded run's own batches; the closed loop serves its workload anew, under the
same limits and policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from analysis.comparison.compare import (
    KINDS,
    closed_loop_errors,
    common_requests,
    compare_decisions,
    latency_model_errors,
)
from analysis.report.tables import TextTable, percent, signed
from engine.config import ServingConfig
from engine.records import manifest
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from sim.latency_model import PARTS
from sim.profile.format import Profile
from sim.replay import Replay, recorded_requests
from sim.simulate import predict
from traces.errors import TandemError

KV_BLOCKS = "kv-blocks"
TERMS = {"host": "host", "skew": "skew", "head": "head", "graph-padding": "padding", "power": "power", KV_BLOCKS: None}
"""What can be left out -> what `sim.simulate` calls it. `kv-blocks` is no term of the latency model: without it, the
number of KV blocks is not the recorded one but what a naive model of memory says."""

FULL = "full"
CLOSED_LOOP = {"ttft": "mean TTFT", "tpot": "mean TPOT", "e2el": "mean E2E"}


def read_terms(said: Sequence[str], profile: Profile) -> list[str]:
    """Terms given one by one or with commas between, each once.

    Raises:
        TandemError: there is no such term, or the profile lacks what it needs.
    """
    terms = list(dict.fromkeys(term.strip() for each in said for term in each.split(",")))
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
            f"--ablate {KV_BLOCKS}: this profile does not say what memory the card has; measure it again, or leave "
            f"{KV_BLOCKS} out"
        )
    return (memory.usable - memory.weights) // memory.block


def ablate(
    real: RunRecords,
    replayed: Replay,
    profile: Profile,
    terms: Sequence[str],
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Predict a recorded run with the full model, and again without each of `terms`.

    Args:
        real: the recorded run.
        replayed: its replay on `profile`.
        profile: what the latency model is made of.
        terms: names of `TERMS`.
        progress: told how many of the `len(terms) + 1` models are done.

    Returns:
        {`full` or term: {`num_blocks`, `latency_model`: {kind of step: {steps, mape, mean_error}}, `closed_loop`:
        {ttft, tpot, e2el: error of the mean, or None}}}; errors are fractions, (predicted - real) / real.

    Raises:
        TandemError: the profile lacks what a term needs.
    """
    config = manifest.config_of(real.manifest)
    configs = {
        term: config if term != KV_BLOCKS else replace(config, num_blocks=naive_blocks(profile)) for term in terms
    }
    results, decisions = {}, compare_decisions(real, replayed.records)
    for done, (term, limits) in enumerate({FULL: config, **configs}.items(), 1):
        ignore = [part] if (part := TERMS.get(term)) else []
        predicted_ns = replayed.without_ns(part) if part in PARTS else replayed.predicted_ns
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
    return {name: errors[name]["mean"]["error"] for name in CLOSED_LOOP}


def ablation_tables(ablation: Mapping[str, Any] | None) -> list[TextTable]:
    """Errors of the full model and of the model without each term, if an ablation was asked for."""
    return [_open_loop_table(ablation), _closed_loop_table(ablation)] if ablation else []


def _open_loop_table(ablation: Mapping[str, Any]) -> TextTable:
    kinds = [kind for kind in KINDS if kind in ablation[FULL]["latency_model"]]
    rows = [
        (_name(term), *(_both(result["latency_model"][kind]) for kind in kinds)) for term, result in ablation.items()
    ]
    title = "Ablation, open loop: predicted against measured time of the same batches, without a term"
    return TextTable(title, "MAPE and mean error, by kind of step.", ("without", *kinds), rows)


def _both(errors: Mapping[str, float | None]) -> str:
    return f"{percent(errors['mape'])} {signed(errors['mean_error']):\u2007>7}"  # HTML keeps this space


def _closed_loop_table(ablation: Mapping[str, Any]) -> TextTable:
    rows = [
        (_name(term), f"{result['num_blocks']:,}", *(signed(result["closed_loop"][name]) for name in CLOSED_LOOP))
        for term, result in ablation.items()
    ]
    columns = ("without", "KV blocks", *CLOSED_LOOP.values())
    note = (
        f"Without {KV_BLOCKS}: as many as fit in the usable memory less the weights." if KV_BLOCKS in ablation else ""
    )
    title = "Ablation, closed loop: errors of the means in a simulation without a term"
    return TextTable(title, note, columns, rows)


def _name(term: str) -> str:
    return "nothing" if term == FULL else term
