"""`tandem fidelity`: a study of how far simulation can be believed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from analysis.cli import options
from analysis.cli.options import Commands, argument, but, listed, option, read_rate
from analysis.cli.output import print_result, progress, read_noted
from analysis.jobs.options import POLICY, Limits, Loading
from traces.outputs import check_writable

app = Commands(name="fidelity", help="Study how far simulation can be believed on a machine.")


@app.command("measure")
def fidelity_measure(
    loading: Loading,
    limits: Annotated[Limits, but(max_seqs=256, max_batched_tokens=2048, pipeline_depth=2)],
    trace: options.TracePath,
    out: options.Out,
    loads: Annotated[
        str, option("Arrival rates, in percent of the capacity, separated by commas.", metavar="PERCENTS")
    ] = "25,50,75,90,100",
    against: Annotated[
        str,
        option("Policies to rank with --scheduler, separated by commas.", group=POLICY, metavar="POLICIES"),
    ] = "fcfs,prefill_first",
    shared: Annotated[
        str,
        option("Those of --loads at which policies are ranked and real runs are repeated.", metavar="PERCENTS"),
    ] = "50,90",
    repeats: Annotated[int, option("Real runs beyond the first at --shared loads, for the spread.", min=0)] = 2,
    seconds: Annotated[float, option("Seconds in which requests arrive, in each run.", min=1, metavar="SECONDS")] = 60,
    seed: options.Seed = 0,
) -> None:
    """Profile this machine, find its capacity, and serve every case for real.

    Called again, it goes on: cases that --out holds already are not served again.
    """
    from analysis.jobs.limits import config_to_check
    from analysis.jobs.run import load_within
    from analysis.jobs.study import Study, measure_study

    check_writable(out / "fidelity.json")
    at, ranked_at = _shares("--loads", loads), _shares("--shared", shared)
    policy = config_to_check(limits).scheduler
    policies = [name for name in against.split(",") if name]
    study = Study(read_noted(trace), policy, at, policies, ranked_at, repeats, seconds, seed)
    executor, settled = load_within(loading, limits, progress)
    measure_study(study, executor, settled.config, out, progress)


def _shares(name: str, text: str) -> list[float]:
    """Of the capacity."""
    return [percent / 100 for percent in listed(name, text, read_rate, "25,50,100")]


@app.command("judge")
def fidelity_judge(
    study: Annotated[Path, argument("Folder that `tandem fidelity measure` filled, here or elsewhere.", "STUDY")],
    targets: Annotated[
        str | None,
        option(
            "Largest errors allowed of TTFT, TPOT and E2E, in percent, separated by commas.",
            default="5,2,2, and 10,5,5 at the capacity",
            metavar="TTFT,TPOT,E2E",
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> int:
    """Simulate and compare every case of a study, and rank the policies.

    Writes fidelity.json into the study. The measured machine is not needed. The exit status is 1 if decisions differ
    anywhere.
    """
    from analysis.comparison.targets import STUDY_TARGETS, read_targets
    from analysis.jobs.study import judge_study
    from analysis.report.study_tables import study_tables

    allowed = read_targets(targets, STUDY_TARGETS)
    judged = judge_study(study, progress, allowed)
    print_result(judged, as_json, lambda found: study_tables(found, allowed))
    return 0 if all(case["result"]["decisions"]["identical"] for case in judged["cases"].values()) else 1
