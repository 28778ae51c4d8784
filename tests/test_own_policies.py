"""A user's mistake in a policy is one line that says where it is and what to do; what is not a mistake works."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from shadow import serve, small_profile

from engine.config import ServingConfig
from engine.planner import PolicyError
from engine.records.recorder import Recorder
from engine.scheduler import load_scheduler
from engine.scheduler.base import Scheduler
from engine.scheduler.registry import check_scheduler
from sim.device_timing import ProfiledTiming
from sim.simulate import simulate
from traces.errors import TandemError
from traces.request import TraceRequest

HEAD = "from engine.scheduler import Scheduler\nfrom engine.scheduler.policies.fcfs import Fcfs\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Iterator[Path]:
    """Where the user stands; what is imported from there is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def write(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEAD + dedent(body))


def load(scheduler: str) -> Scheduler:
    return load_scheduler(ServingConfig(num_blocks=50, scheduler=scheduler))


def complaint(scheduler: str) -> str:
    with pytest.raises(TandemError) as caught:
        load(scheduler)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_check_makes_a_policy_of_the_run_s_size_only_if_it_refuses_a_small_one(here):
    write(
        here,
        "mine.py",
        """
        class P(Fcfs):
            sizes = []
            def __init__(self, config, least=1):
                super().__init__(config)
                self.sizes.append(config.num_blocks)
                if config.num_blocks < least: raise ValueError(f"needs {least} blocks")
        """,
    )
    check_scheduler(ServingConfig(num_blocks=50, scheduler="mine:P"))
    check_scheduler(ServingConfig(num_blocks=50, scheduler="mine:P:least=9"))
    assert sys.modules["mine"].P.sizes == [1, 1, 50]
    with pytest.raises(PolicyError, match="raised ValueError: needs 51 blocks"):
        check_scheduler(ServingConfig(num_blocks=50, scheduler="mine:P:least=51"))


# -- what is wrong before anything runs ------------------------------------------------------------------------

INIT = "class P(Fcfs):\n    def __init__(self, config{parameter}):\n        {first}\n        super().__init__(config)\n"
PLAN = "class P(Fcfs):\n    {plan}\n        {body}\n"
WRONG = {  # what mine.py says after HEAD, and what is said of it; the class P begins in line 3
    "no super().__init__": (
        "class P(Fcfs):\n    def __init__(self, config): self.level = 1",
        r"P \(.*mine\.py:3\) does not begin its __init__ with super\(\).__init__\(config\)",
    ),
    "super().__init__ comes too late": (
        INIT.format(parameter="", first="self.seen = len(self.waiting)"),
        r"P \(.*mine\.py:5\) does not begin its __init__ with super",
    ),
    "a keyword parameter without a default": (
        INIT.format(parameter=", *, level", first="pass"),
        r"P \(.*mine\.py:3\) has a parameter level without a default: give it one, such as level=1",
    ),
    "a further positional parameter": (
        INIT.format(parameter=", level", first="pass"),
        r"P \(.*mine\.py:3\) has a parameter level without a default",
    ),
    "no config": (
        "class P(Fcfs):\n    def __init__(self): pass",
        r"P \(.*mine\.py:3\) cannot be made from the config alone: too many positional",
    ),
    "a syntax error": (PLAN.format(plan="def plan(self, now)", body="pass"), r"cannot import mine: .*mine\.py:4: "),
    "an import that fails": ("import nothing_of_that_name", r"mine\.py:3 raised ModuleNotFoundError: .*that_name"),
    "an exception at import": ("class P(Fcfs): chunked = Yes", r"mine\.py:3 raised NameError: .*'Yes'"),
    "a script that exits": ("import sys\nsys.exit(0)", r"cannot import mine: .*mine\.py:4 raised SystemExit"),
    "no plan": ("class P(Scheduler): chunked = True", r"P \(.*mine\.py:3\) has no plan\(now\): write that method"),
    "a plan without now": (
        PLAN.format(plan="def plan(self):", body="self.decode()"),
        r"P \(.*mine\.py:3\) has a plan that cannot be called as plan\(now\)",
    ),
    "a hook of another form": (
        PLAN.format(plan="def on_admit(self):", body="pass"),
        r"has a on_admit that cannot be called as on_admit\(request\)",
    ),
    "a plan that yields": (PLAN.format(plan="def plan(self, now):", body="yield"), "has a plan that yields"),
    "an async plan": (PLAN.format(plan="async def plan(self, now):", body="pass"), "has an async plan"),
    "a plan that is no method": ("class P(Fcfs): plan = 3", "has a `plan` that is not a method"),
    "a name of the base class's": (
        "class P(Fcfs):\n    def __init__(self, config):\n        super().__init__(config)\n        self.running = []",
        r"P \(.*mine\.py:3\) keeps a list in `running`, where the base class has its own",
    ),
    "not a policy": ("class P: pass", "P is not a Scheduler; derive it from engine.scheduler.Scheduler"),
    "a misspelt class": ("class PP(Fcfs): pass", r"mine has no class 'P': did you mean PP\?"),
    "another class": ("class Other(Fcfs): pass", "mine has no class 'P': its policies are Other"),
    "no class": ("", "mine has no class 'P', and no other policy"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("source", ["mine", "mine.py"])
def test_a_mistake_is_told_in_a_line(here, case, source):
    body, words = WRONG[case]
    write(here, "mine.py", body)
    assert re.search(
        words.replace("mine:", f"{source}:").replace("mine has", f"{source} has"), complaint(f"{source}:P")
    )


def test_a_mistake_in_a_module_that_the_policy_imports_is_told_there(here):
    write(here, "helper.py", "\n1 / 0")
    write(here, "mine.py", "import helper")
    assert re.search(r"cannot import mine: .*helper\.py:4 raised ZeroDivisionError", complaint("mine:P"))


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (
            "nowhere:P",
            r"cannot import nowhere: .*; run from its folder, or give its file, as path/to/nowhere\.py:Class",
        ),
        ("nowhere.py:P", r"there is no file nowhere\.py"),
        ("mine", r"unknown scheduler 'mine': for mine\.py, say mine:Class"),
        ("mine.py", r"unknown scheduler 'mine\.py': for mine\.py, say mine\.py:Class"),
        ("fcsf", r"unknown scheduler 'fcsf': did you mean fcfs\? Else choose chunked_prefill, edf"),
        ("mine:P:level", "cannot read 'level': give a parameter as level=VALUE"),
        ("mine:P:level=1:level=2", "level is given twice"),
        ("mine:P:level=many", "level is 'many', not of type int"),
        ("mine:P:shares=1", "shares cannot be given in words: its default is of type NoneType"),
        ("mine:P:levels=1", "it has no parameter 'levels': it has level=4, shares=None"),
    ],
)
def test_a_name_that_says_too_little_is_told_what_it_lacks(here, scheduler, words):
    write(here, "mine.py", INIT.format(parameter=", level=4, shares=None", first="pass"))
    assert re.search(words, complaint(scheduler))


@pytest.mark.parametrize("name", ["queue", "imp", "sim", "numpy"])
def test_a_module_whose_name_is_taken_is_not_looked_for_elsewhere(here, name):
    write(here, f"{name}.py", "class P(Fcfs): pass")
    assert f"the name {name} is taken" in complaint(f"{name}:P")
    assert type(load(f"./{name}.py:P")).__name__ == "P"


# -- what is no mistake ----------------------------------------------------------------------------------------


def test_a_policy_is_given_as_a_file_with_parameters_and_imports_from_beside_it(here):
    write(here, "ideas/numbers_of_mine.py", "LEVEL = 7")
    body = "from numbers_of_mine import LEVEL\n" + INIT.format(parameter=", *, level=LEVEL", first="self.level = level")
    write(here, "ideas/mine.py", body)
    for scheduler, level in (("ideas/mine.py:P", 7), (f"{here}/ideas/mine.py:P:level=3", 3)):
        assert load(scheduler).level == level


def test_parameters_may_be_positional_and_those_of_a_base_class_handed_on(here):
    body = """
        from engine.scheduler.policies.chunked_prefill import ChunkedPrefill
        class P(ChunkedPrefill):
            def __init__(self, config, level=1, **others):
                super().__init__(config, **others)
                self.level = level
    """
    write(here, "mine.py", body)
    made = load("mine:P:budget=64:level=2")
    assert (made.level, made.config.max_batched_tokens) == (2, 64)


# -- what comes to light as it runs ----------------------------------------------------------------------------

FILL = "for request in self.queue():\n            if not self.prefill(request): break"
FAILING = {
    "nothing decodes": (
        PLAN.format(plan="def plan(self, now):", body=FILL),
        r"P \(.*mine\.py:3\) .*32 requests wait .*: decode\(\) was not called, and 32 requests could decode",
    ),
    "nothing is prefilled": (
        PLAN.format(plan="def plan(self, now):", body="self.decode()"),
        r"plans nothing, but 32 requests wait .*: prefill\(request\) was not called for 32 of them that fit",
    ),
    "all is preempted": (
        PLAN.format(
            plan="def plan(self, now):", body=f"{FILL}\n        while self.running: self.preempt(self.victim())"
        ),
        r"plans nothing, .*: after what it has preempted, none fits \(500 of 500 KV blocks are free, 0 of",
    ),
    "plan returns what it would run": (
        PLAN.format(plan="def plan(self, now):", body="return list(self.waiting)"),
        r"P \(.*mine\.py:3\) returns a list from plan: its calls of prefill, decode and preempt are the plan",
    ),
    "a queue changes under a loop": (
        PLAN.format(plan="def plan(self, now):", body="for each in self.waiting.values(): self.prefill(each)"),
        r"P \(.*mine\.py:5\) raised RuntimeError: .*mutated during iteration; .* go through self.queue\(\)",
    ),
    "prefill of who decodes": (
        PLAN.format(
            plan="def plan(self, now):", body="for each in self.running.values(): self.prefill(each)\n        " + FILL
        ),
        r"P \(.*mine\.py:5\) prefills request \d+, whose prefill is complete: decode\(\) runs it",
    ),
    "prefill of a number": (
        PLAN.format(plan="def plan(self, now):", body="self.prefill(next(iter(self.waiting)))"),
        r"P \(.*mine\.py:5\) raised AttributeError: 'int' object",
    ),
    "an arrival is kept from the base class": (
        PLAN.format(plan="def arrive(self, request):", body="self.mine = request"),
        r"P \(.*mine\.py:3\) loses request 0 as it arrives: let its arrive call super\(\).arrive\(request\)",
    ),
    "a cancellation is kept from the base class": (
        PLAN.format(plan="def cancel(self, request):", body="pass"),
        "goes on with request 0, which is cancelled: let its cancel call super",
    ),
    "a preemption is kept from the base class": (
        PLAN.format(plan="def preempt(self, request):", body="pass"),
        r"keeps request \d+ running in its preempt: let that call super\(\).preempt",
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_what_a_policy_does_wrong_ends_the_run_with_a_line(here, case):
    body, words = FAILING[case]
    write(here, "mine.py", body)
    blocks, cancel_ns = 64 if "preemption" in case else 500, 10**7 if "cancel" in case else None
    config = ServingConfig(num_blocks=blocks, max_seqs=32, max_batched_tokens=640, scheduler="mine.py:P")
    requests = [TraceRequest(each, each, 20, 30, 30, cancel_ns=cancel_ns) for each in range(32)]
    with pytest.raises(TandemError) as caught:
        simulate(requests, config, ProfiledTiming(small_profile()), Recorder())
    assert re.search(words, str(caught.value)) and len(str(caught.value).splitlines()) == 1


def test_who_is_rejected_for_want_of_chunks_is_told_of_chunks(here):
    write(here, "mine.py", "class P(Fcfs): pass")
    config = ServingConfig(num_blocks=500, max_batched_tokens=32, scheduler="mine:P")
    _, served = serve([TraceRequest(0, 0, 100, 10, 10)], config)
    assert "109 tokens exceeds max_batched_tokens 32: raise it, or serve with `chunked = True`" in served[0].reason


class PrefillsFirst(Scheduler):
    """Plans a waiting prompt, and then the decodes beside it."""

    chunked = True

    def plan(self, now: int) -> None:
        for request in self.queue():
            self.prefill(request)
        self.decode()


@pytest.mark.parametrize(("prompt", "decodes"), [(4, 4), (5, 0)])
def test_decodes_that_just_fill_the_budget_run_beside_a_prefill_and_one_too_many_waits(prompt, decodes):
    config = ServingConfig(num_blocks=100, max_seqs=5, max_batched_tokens=8)
    running = [TraceRequest(place, 0, 2, 40, 40) for place in range(4)]
    late = TraceRequest(4, 20_000_000, prompt, 40, 40)
    steps = serve([*running, late], config, scheduler=PrefillsFirst(config))[0].tables()["steps"].to_pylist()
    beside = next(step for step in steps if step["prefill_tokens"] == prompt)
    assert beside["decode_tokens"] == decodes
