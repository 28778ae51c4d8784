"""Finds out whether a policy is deterministic: a run is planned again elsewhere, and its plans must be the same.

A replay gives the policy the recorded times and events. It runs in other processes, which have another hash seed,
another random state, other addresses, and clocks that go at another pace. Whatever a policy may use is as it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from analysis.comparison.compare import compare_decisions
from engine.planner import PolicyError
from engine.records import manifest
from engine.records.run_folder import RunRecords, StoredTables
from engine.records.schema import COLUMNS
from engine.scheduler.policy_error import called
from engine.scheduler.registry import find_policy
from sim.replay import replay
from traces.errors import TandemError

OPENING = 2000  # turns of the serving loop: some 0.1 s of planning
PACES = (1e6, 1e-6, 1e3, 1e-3)  # of clocks, so that a second is days in one and nothing in another
_ROOT = str(Path(__file__).parents[2])
_CHILD = "import sys; sys.path.insert(0, sys.argv[1]); from analysis.jobs.determinism import main; main()"
_SHOWN = 3  # columns of a step


def check_deterministic(folder: Path, system: Mapping[str, Any], whole: bool) -> str | None:
    """Plan a recorded run again in two other processes, or, if it is the `whole` run, its opening in two more.

    Args:
        folder: the run's tables.
        system: of its manifest.
        whole: whether all of it is planned again, not just its first `OPENING` turns.

    Returns:
        Why it could not be found out, if so.

    Raises:
        PolicyError: a step differs; the message names the policy, with file and line, and the step.
        TandemError: a process failed.
    """
    if system["scheduler"].startswith("__main__:"):
        return "no other process has the policy, so whether it is deterministic is unknown: put it into a file"
    others = [seed for seed in map(str, range(1, 6)) if seed != os.environ.get("PYTHONHASHSEED")]
    turns = [None, None, OPENING, OPENING] if whole else [OPENING, OPENING]
    ask = partial(_answer, {"folder": str(folder.resolve()), "system": dict(system), "path": sys.path})
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(ask, turns, others, PACES))
    changed = next((answer["changed"] for answer in answers if answer["changed"]), None)
    if changed:
        return f"{', '.join(changed)} changed while the run went on, so whether the policy is deterministic is unknown"
    apart = [answer for answer in answers if answer["raised"] or answer["difference"]]
    if apart:
        policy, _ = find_policy(system["scheduler"])
        told = _told(min(apart, key=_step))
        raise PolicyError(f"{called(policy)} is not deterministic: planned again, {told}; a policy may use {_ALLOWED}")
    return None


_ALLOWED = "its state, the events and `now`: no clock, no random numbers without a seed, no hash(), no order of a set"


def _step(answer: Mapping[str, Any]) -> int:
    """Which step differs; one that raised cannot tell."""
    return int(answer["difference"]["step"]) if answer["difference"] else sys.maxsize


def _told(answer: Mapping[str, Any]) -> str:
    """How a plan differs from the recorded one."""
    if answer["raised"]:
        return f"it fails: {answer['raised']}"
    difference = answer["difference"]
    if not (difference["real"] and difference["replay"]):
        return f"step {difference['step']} is {'missing' if difference['real'] else 'one more'}"
    columns = list(difference["columns"].items())[:_SHOWN]
    shown = ", ".join(f"{name}: {both['real']} vs {both['replay']}" for name, both in columns)
    return f"step {difference['step']} differs ({shown or 'other requests or blocks'})"


def _answer(question: Mapping[str, Any], turns: int | None, hash_seed: str, pace: float) -> dict[str, Any]:
    """Ask another process."""
    asked = json.dumps({**question, "turns": turns, "pace": pace})
    command = [sys.executable, "-P", "-c", _CHILD, _ROOT, asked]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        *_, last = ["no word", *done.stderr.splitlines()]
        raise TandemError(f"the run could not be planned again to see whether the policy is deterministic: {last}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


# -- in the other process --------------------------------------------------------------------------------------


def main() -> None:
    """Plan again what the arguments say, and print what differs."""
    question = json.loads(sys.argv[2])
    sys.path[:] = question["path"]
    for name in ("time", "monotonic", "perf_counter"):
        for each in (name, f"{name}_ns"):
            setattr(time, each, _paced(getattr(time, each), question["pace"]))
    with redirect_stdout(sys.stderr):  # a policy may print
        answer = _plan_again(Path(question["folder"]), {"system": question["system"]}, question["turns"])
    print(json.dumps(answer))


def _plan_again(folder: Path, of: manifest.Manifest, turns: int | None) -> dict[str, Any]:
    changed, raised, difference = manifest.changed_sources(of), None, None
    tables = StoredTables(folder)
    run = RunRecords({}, tables if turns is None else _opening(RunRecords({}, tables), turns))
    try:
        difference = compare_decisions(run, replay(run, manifest.config_of(of)).records)["first_difference"]
    except PolicyError as error:
        raised = str(error)
    return {"changed": changed, "raised": raised, "difference": difference}


def _opening(run: RunRecords, turns: int) -> dict[str, Any]:
    """The tables of a run as if it had been cut off after so many turns of the loop.

    The events of the turn after are in it, for which the last may have waited.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    iterations = next(run.batches("iterations", *COLUMNS["iterations"])).slice(0, turns + 1)
    last_ns = iterations["now_ns"][-1].as_py()
    iterations = iterations.slice(0, turns)
    completed = len(iterations) - iterations["completed_step"].null_count
    steps = next(run.batches("steps", *COLUMNS["steps"])).slice(0, completed)
    batches = run.batches("requests", *COLUMNS["requests"])  # in order of delivery
    come = [next(batches), *takewhile(lambda batch: batch["delivered_ns"][0].as_py() <= last_ns, batches)]
    requests = pa.concat_tables([batch.filter(pc.less_equal(batch["delivered_ns"], last_ns)) for batch in come])
    return {"iterations": iterations, "steps": steps, "requests": requests}


def _paced(clock: Callable[[], Any], pace: float) -> Callable[[], Any]:
    """A clock that goes on from where it is, faster or slower."""
    start = clock()
    return lambda: start + type(start)((clock() - start) * pace)
