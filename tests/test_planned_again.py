"""A policy that is not deterministic is found out, by what it planned being planned again; one that is, passes."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import LIMITS, tandem, work
from test_replay import digests, record
from test_scheduling_properties import configs, workloads

from analysis.jobs.determinism import _opening, check_deterministic
from analysis.jobs.options import RunOptions
from analysis.jobs.progress import Silent
from analysis.jobs.run import simulate_run
from engine.config import ServingConfig
from engine.planner import PolicyError
from engine.records.run_folder import RunRecords, read_run
from sim.profile.format import find_profile, read_profile
from sim.replay import replay
from traces.request import TraceRequest
from traces.trace import Trace

__all__ = ["work"]  # a fixture

POLICIES = '''
import os, random, time
from pathlib import Path
from datetime import datetime
from engine.scheduler.policies.chunked_prefill import ChunkedPrefill
from engine.scheduler.keyed import KeyedScheduler


class ByClock(KeyedScheduler):
    """Who came in an odd nanosecond goes first."""
    def arrive(self, request):
        self.odd = getattr(self, "odd", {}) | {request.id: time.time_ns() % 1000}
        super().arrive(request)
    def key(self, request): return (self.odd[request.id], request.id)


class ByElapsed(ChunkedPrefill):
    """Decodes alone once it has run for ten minutes, which no test does."""
    def plan(self, now):
        self.start = getattr(self, "start", None) or time.monotonic()
        if time.monotonic() < self.start + 600 or not self.decoding: super().plan(now)
        else: self.decode()


class ByLuck(ChunkedPrefill):
    def plan(self, now):
        if not self.running or random.random() < 0.9: super().plan(now)
        else: self.decode()


class BySet(KeyedScheduler):
    """Goes through names in no order."""
    def key(self, request):
        names = {f"client {each}" for each in range(50)}
        return (list(names).index(f"client {request.id % 50}"), request.id)


class ByHash(KeyedScheduler):
    def key(self, request): return (hash(f"client {request.id}"), request.id)


class ByAddress(KeyedScheduler):
    def key(self, request): return (id(request), request.id)


class Breaks(ChunkedPrefill):
    """Works in the first process that plans with it, and in no other."""
    def plan(self, now):
        super().plan(now)
        if not FILE.exists(): FILE.write_text(str(os.getpid()))
        if FILE.read_text() != str(os.getpid()): raise RuntimeError("once is enough")


class Patient(ChunkedPrefill):
    """Serves pairs: who comes alone waits for the next."""
    def plan(self, now):
        if self.running or len(self.waiting) > 1: super().plan(now)


class Talks(ChunkedPrefill):
    """Looks at the clock and draws lots, and decides by neither; its lots have a seed where it does."""
    def plan(self, now):
        print("it is", time.time(), datetime.now(), random.random())
        self.lots = getattr(self, "lots", None) or random.Random(7)
        if not self.running or self.lots.random() < 0.9: super().plan(now)
        else: self.decode()


FILE = Path(__file__).with_name("first")
'''
NOT_DETERMINISTIC = ["ByClock", "ByElapsed", "ByLuck", "BySet", "ByHash", "ByAddress"]


@pytest.fixture
def policies(tmp_path) -> Path:
    (tmp_path / "mine.py").write_text(POLICIES)
    return tmp_path


def run(folder: Path, policy: str, check: bool = False) -> RunRecords:
    generator = random.Random(1)
    requests = [
        TraceRequest(each, each * 2_000_000, generator.randint(50, 400), output_len=20, max_tokens=20)
        for each in range(150)
    ]
    config = ServingConfig(num_blocks=2000, max_seqs=8, scheduler=f"{folder}/mine.py:{policy}")
    profile = read_profile(find_profile(Path("a100-80gb/llama-3-8b")))
    options = RunOptions(check=check, overwrite=True)
    return simulate_run(Trace(requests), profile, config, folder / "run", Silent(), options=options)


@pytest.mark.parametrize("policy", NOT_DETERMINISTIC)
def test_a_policy_that_is_not_deterministic_ends_the_run_with_the_step_where_plans_part(policies, policy):
    line = 1 + POLICIES.splitlines().index(next(each for each in POLICIES.splitlines() if f"class {policy}" in each))
    with pytest.raises(PolicyError) as caught:
        run(policies, policy)
    assert re.match(
        rf"{policy} \({policies}/mine\.py:{line}\) is not deterministic: planned again, step \d+ "
        r"differs \(.*\); "
        r"a policy may use its state, the events and `now`: no clock, no random numbers",
        str(caught.value),
    )
    assert len(str(caught.value).splitlines()) == 1 and not (policies / "run").exists()


def test_so_does_one_that_fails_the_second_time(policies):
    with pytest.raises(
        PolicyError, match=r"Breaks .* planned again, it fails: .*mine\.py:\d+\) raised RuntimeError: once"
    ):
        run(policies, "Breaks")


@pytest.mark.parametrize("check", [False, True])
def test_a_deterministic_policy_passes_whatever_it_looks_at_and_prints(policies, check):
    assert run(policies, "Talks", check).summary["completed"] == 150


def test_all_of_a_run_is_planned_again_if_it_is_checked_and_the_opening_of_ones_own_if_not(policies, monkeypatch):
    monkeypatch.setattr("analysis.jobs.determinism.OPENING", 3)  # before the first lot falls on the other side
    lucky = POLICIES.replace("random.random() < 0.9", "self.decoding.ticks < 30 or random.random() < 0.9")
    (policies / "mine.py").write_text(lucky)
    run(policies, "ByLuck")
    with pytest.raises(PolicyError, match=r"ByLuck .* is not deterministic: planned again, step \d\d+ differs"):
        run(policies, "ByLuck", check=True)


def test_a_policy_that_was_edited_meanwhile_is_not_accused(policies):
    done = run(policies, "Talks")
    (policies / "mine.py").write_text(POLICIES.replace("super().plan(now)", "self.decode()"))
    found = check_deterministic(policies / "run", done.manifest["system"], whole=False)
    assert found == "mine.py changed while the run went on, so whether the policy is deterministic is unknown"


@settings(max_examples=60, deadline=None)
@given(workloads(), configs(), st.integers(1, 60))
def test_the_opening_of_a_run_can_be_planned_again_by_itself(requests, config, turns):
    whole = record(requests, config)
    opening = RunRecords({}, _opening(whole, turns))
    assert len(opening.tables["iterations"]) == min(turns, len(whole.tables["iterations"]))
    assert digests(replay(opening, config).records)[: len(digests(opening))] == digests(opening)
    assert len(digests(replay(opening, config).records)) == len(digests(opening))


@pytest.mark.parametrize("turns", range(1, 12))
def test_an_opening_that_ends_while_a_policy_waits_for_the_next_is_no_fault_of_it(policies, turns, monkeypatch):
    monkeypatch.setattr("analysis.jobs.determinism.OPENING", turns)
    requests = [TraceRequest(each, each * 10**9, 50, 3, 3) for each in range(6)]
    config = ServingConfig(num_blocks=2000, scheduler=f"{policies}/mine.py:Patient")
    whole = record(requests, config)
    opening = RunRecords({}, _opening(whole, turns))
    assert digests(replay(opening, config).records) == digests(opening)


def test_a_real_run_is_planned_again_too_and_its_records_are_kept(work):
    (work / "luck.py").write_text(POLICIES)
    command = (
        "run",
        "--trace",
        "t.parquet",
        "--model",
        "model",
        "--threads",
        1,
        *LIMITS,
        "--out",
        "luck",
        "--overwrite",
    )
    done = tandem(*command, "--scheduler", "luck:ByLuck", cwd=work, check=False)
    assert done.returncode == 2
    assert re.search(r"tandem: ByLuck \(.*luck\.py:\d+\) is not deterministic: planned again, step", done.stderr)
    assert read_run(work / "luck").summary["completed"] == 30
    tandem(*command, "--scheduler", "luck:Talks", "--check", cwd=work)


# -- which policy a run was of ---------------------------------------------------------------------------------

EARLIER = (
    "from levels import LEVEL\nfrom engine.scheduler.policies.fcfs import Fcfs\nclass P(Fcfs):\n    level = LEVEL\n"
)
LATER = f"{EARLIER}    def plan(self, now):\n        super().plan(now) if self.waiting else self.decode()\n"
SIMULATE = ("simulate", "--trace", "t.parquet", "--profile", "a100", "--scheduler", "sourced:P", "--max-seqs", 4)


@pytest.fixture
def recorded(work) -> Path:
    """Two runs of a policy that a module beside it has a part in: `sim`, and `before`, which says that it is real."""
    (work / "sourced.py").write_text(EARLIER)
    (work / "levels.py").write_text("LEVEL = 1\n")
    if not (work / "sim").exists():  # which no test changes
        tandem(*SIMULATE, "--out", "before", cwd=work)
        shutil.copytree(work / "before", work / "sim")
        call_real(work / "before")
    return work


def call_real(run: Path) -> None:
    path = run / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["provenance"]["backend"] = "executor"
    path.write_text(json.dumps(manifest))


def compare(folder: Path, sim: str, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return tandem("compare", sim, "before", "-p", "a100", "-o", "c", "--overwrite", *options, cwd=folder, check=check)


def system_of(run: Path) -> dict[str, object]:
    return read_run(run).manifest["system"]


def test_a_manifest_has_a_digest_of_each_file_of_the_policy_and_all_its_parameters(recorded):
    assert system_of(recorded / "before")["scheduler_source"].keys() == {"sourced.py", "levels.py"}
    tandem(*SIMULATE[:-3], "chunked_prefill", "--out", "shipped", cwd=recorded)
    shipped = system_of(recorded / "shipped")
    assert shipped["scheduler_source"].keys() == {"engine/scheduler/policies/chunked_prefill.py"}
    assert shipped["scheduler_parameters"] == {"budget": 0}


@pytest.mark.parametrize("name", ["sourced.py", "levels.py"])
def test_a_file_that_was_edited_since_is_named_before_equal_steps_are_counted(recorded, name):
    text = (recorded / name).read_text()
    (recorded / name).write_text(f"{text}# with a remark\n")
    done = compare(recorded, "sim")
    assert f"note: {name} changed since the real run was recorded" in done.stderr
    assert re.search(rf"{name} changed since the real run was recorded\. Given the real", " ".join(done.stdout.split()))
    (recorded / name).write_text(text)
    assert "changed" not in compare(recorded, "sim").stderr


def test_runs_of_two_versions_of_a_policy_are_not_alike(recorded):
    (recorded / "sourced.py").write_text(LATER)
    tandem(*SIMULATE, "--like", "before", "--out", "after", "--overwrite", cwd=recorded)
    assert system_of(recorded / "after")["scheduler_source"] != system_of(recorded / "before")["scheduler_source"]
    refused = compare(recorded, "after", check=False)
    assert refused.returncode == 2 and "--allow-different system.scheduler_source.sourced.py" in refused.stderr
    # What they decide differs, which compare's status may say.
    assert compare(recorded, "after", "--allow-different", "system.scheduler_source", check=False).returncode < 2


def test_runs_of_two_policies_differ_in_the_policy_alone_and_older_runs_know_nothing_of_sources(recorded):
    tandem(*SIMULATE[:-3], "fcfs", "--max-seqs", 4, "--out", "other", cwd=recorded)
    printed = json.loads(compare(recorded, "other", "--json", "--allow-different", "system.scheduler").stdout)
    assert printed["manifest_differences"].keys() == {"system.scheduler"}
    tandem(*SIMULATE, "--out", "older", cwd=recorded)
    path = recorded / "older/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["system"]["scheduler_source"], manifest["system"]["scheduler_parameters"]
    path.write_text(json.dumps(manifest))
    for pair in (("older", "before"), ("sim", "older")):
        if pair[1] == "older":
            call_real(recorded / "older")
        done = tandem("compare", *pair, "-p", "a100", "-o", "c", "--overwrite", "--json", cwd=recorded)
        assert json.loads(done.stdout)["manifest_differences"] == {} and "changed" not in done.stderr
