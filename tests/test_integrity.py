"""The integrity mode finds each way a step can be wrong; policies at fault are named, with file and line."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import simpy
from shadow import small_profile
from test_executor import executor
from test_executor import serve as serve_for_real
from tiny_models import tiny_model

from engine.checks.step_checker import CheckedBackend, IntegrityError, StepChecker
from engine.config import ServingConfig
from engine.executor.executor import Executor
from engine.instance import Instance
from engine.planner import PolicyError
from engine.prefix_hash import Content
from engine.records.recorder import Recorder
from engine.request import CANCELLED, LENGTH, STOP, Request
from engine.scheduler import load_scheduler
from engine.scheduler.base import Scheduler
from engine.scheduler.policies.chunked_prefill import ChunkedPrefill
from engine.scheduler.policies.fcfs import Fcfs
from engine.step import Chunk, Copies, Step, StepLoad
from sim.backend import SimBackend
from sim.device_timing import ProfiledTiming
from traces.request import TraceRequest

HERE = Path(__file__).name
CONFIG = ServingConfig(num_blocks=8, block_size=4, max_seqs=3, max_batched_tokens=20, num_cpu_blocks=4)

__all__ = ["executor"]  # a fixture


# -- one wrong step after right ones ---------------------------------------------------------------------------


def checker(config: ServingConfig = CONFIG, prompt_len: int = 6, **fields: object) -> StepChecker:
    """Three requests have arrived; the first, of `prompt_len` tokens, has been prefilled into blocks 0 and 1."""
    account = StepChecker(config)
    account.enter(Request(number, 0, prompt_len, 4, **fields) for number in range(3))
    account.check(step(0, chunks={0: Chunk(0, prompt_len, True)}, blocks={0: [0, 1]}, used=2, running=1))
    return account


def step(
    index: int, used: int = 0, running: int = 0, kv_tokens: int = 0, kv_squares: int = 0, **changes: object
) -> Step:
    return Step(index, load=StepLoad(kv_tokens, kv_squares, used, running), **changes)


def decode(index: int, **changes: object) -> Step:
    """The first request makes its second token."""
    return step(index, **{"used": 2, "running": 1, "decodes": 1, "kv_tokens": 6, "kv_squares": 36} | changes)


WRONG = {
    "a number is left out": (decode(2, joined={0: 6}), "the number of the step"),
    "a block is given twice": (
        step(1, chunks={1: Chunk(0, 3, False)}, blocks={1: [1]}),
        "request 1: owners of block 1, which it is given\n  expected  []\n  found     [0]",
    ),
    "there is no such block": (
        step(1, chunks={1: Chunk(0, 3, False)}, blocks={1: [8]}),
        "request 1: whether there is a block 8\n  expected  True\n  found     False",
    ),
    "a chunk skips tokens": (
        step(1, used=3, running=2, chunks={1: Chunk(4, 2, True)}, blocks={1: [2]}),
        "request 1: start of its chunk, which is where its cache ends\n  expected  0\n  found     4",
    ),
    "a chunk is empty": (
        step(1, used=3, running=2, chunks={1: Chunk(0, 0, False)}, blocks={1: [2]}),
        "request 1: start of its chunk, lest it be empty",
    ),
    "a chunk ends beyond the prompt": (
        step(1, used=4, running=2, chunks={1: Chunk(0, 7, True)}, blocks={1: [2, 3]}),
        "request 1: end of its chunk\n  expected  at most 6\n  found     7",
    ),
    "a chunk samples too early": (
        step(1, used=3, running=2, chunks={1: Chunk(0, 3, True)}, blocks={1: [2]}),
        "request 1: whether its chunk samples\n  expected  False\n  found     True",
    ),
    "too few blocks": (
        step(1, used=3, running=2, chunks={1: Chunk(0, 6, True)}, blocks={1: [2]}),
        "request 1: blocks that its tokens take up\n  expected  at most 1\n  found     2",
    ),
    "over budget": (
        step(1, chunks={1: Chunk(0, 21, True)}),
        "tokens\n  expected  at most 20\n  found     21",
    ),
    "nothing runs": (step(1), "whether the step runs anything"),
    "somebody joins with another context": (
        decode(1, joined={0: 5}),
        "request 0: context of a request that joins\n  expected  6\n  found     5",
    ),
    "somebody joins who was not prefilled": (
        decode(1, joined={0: 6, 1: 0}),
        "request 1: tokens in the cache of a request that joins\n  expected  5\n  found     0",
    ),
    "nobody decodes": (decode(1), "requests that decode\n  expected  0\n  found     1"),
    "contexts are miscounted": (decode(1, joined={0: 6}, kv_tokens=7), "sum of the decodes' contexts"),
    "squares are miscounted": (decode(1, joined={0: 6}, kv_squares=7), "sum of their squares"),
    "blocks are miscounted": (decode(1, joined={0: 6}, used=3), "blocks in use\n  expected  2\n  found     3"),
    "requests are miscounted": (decode(1, joined={0: 6}, running=2), "requests that hold blocks"),
    "somebody finishes early": (
        decode(1, joined={0: 6}, finishing=[0]),
        "request 0: output tokens of a request that finishes\n  expected  4\n  found     2",
    ),
    "a request is unknown": (step(1, chunks={9: Chunk(0, 1, True)}, blocks={9: [2]}), "the step names request 9"),
    "somebody is dropped for no reason": (step(1, dropped=[0]), "request 0: whether a dropped request has ended"),
    "a half prefill is swapped out": (
        step(1, swapped_out={1: Copies([], [])}),
        "request 1: tokens in the cache of a request that is swapped out\n  expected  5\n  found     0",
    ),
    "blocks are left behind by a swap": (
        step(1, swapped_out={0: Copies([0], [0])}),
        "request 0: blocks that are swapped out\n  expected  [0, 1]\n  found     [0]",
    ),
    "there is no such block in host memory": (
        step(1, swapped_out={0: Copies([0, 1], [3, 4])}),
        "request 0: whether there is a CPU block 4",
    ),
    "somebody returns who was not swapped out": (
        step(1, swapped_in={1: Copies([0], [5])}),
        "request 1: CPU blocks that are swapped in\n  expected  []\n  found     [0]",
    ),
    "somebody is swapped out and in by one step": (
        step(1, swapped_out={0: Copies([0, 1], [0, 1])}, swapped_in={0: Copies([0, 1], [0, 1])}),
        "CPU blocks that are both read and written\n  expected  []\n  found     [0, 1]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_step_is_told_from_a_right_one(case):
    wrong, complaint = WRONG[case]
    with pytest.raises(IntegrityError) as caught:
        checker().check(wrong)
    assert str(caught.value).startswith(f"breaks an invariant in step 1: {complaint}")


def test_right_steps_pass():
    account = checker()
    account.check(decode(1, joined={0: 6}))
    account.check(decode(2, kv_tokens=7, kv_squares=49, swapped_out={}))
    account.check(step(3, swapped_out={0: Copies([0, 1], [2, 3])}))
    account.check(step(4, used=2, running=1, swapped_in={0: Copies([2, 3], [6, 7])}))
    account.check(decode(5, joined={0: 8}, blocks={0: [1]}, used=3, kv_tokens=8, kv_squares=64, finishing=[0]))


def test_who_has_stopped_must_leave_and_may_not_come_back():
    account = checker()
    account.states[0].request.outcome = STOP
    with pytest.raises(IntegrityError, match="requests that have stopped or were cancelled, and still hold blocks"):
        account.check(decode(1, joined={0: 6}))
    account.check(step(1, dropped=[0], used=2, running=1, chunks={1: Chunk(0, 6, True)}, blocks={1: [0, 1]}))
    with pytest.raises(IntegrityError, match=r"names request 0\n.*not ended\n.*it was dropped in step 1 \(stop\)"):
        account.check(step(2, chunks={0: Chunk(0, 6, True)}, blocks={0: [2, 3]}))


def test_who_joins_a_step_too_early_after_a_swap_is_found():
    account = checker()
    account.check(step(1, swapped_out={0: Copies([0, 1], [2, 3])}))
    with pytest.raises(IntegrityError, match="step that swapped in a request that joins"):
        account.check(decode(2, swapped_in={0: Copies([2, 3], [6, 7])}, joined={0: 6}))


def test_what_was_lost_is_found_when_all_is_over():
    account = checker()
    with pytest.raises(IntegrityError, match=r"leaves 3 requests unserved, .*: \[0, 1, 2\]"):
        account.close()
    for number, outcome in enumerate((LENGTH, CANCELLED, CANCELLED)):
        account.states[number].request.outcome = outcome
    with pytest.raises(IntegrityError, match="said to have finished that no step finished"):
        account.close()


SHARING = dataclasses.replace(CONFIG, prefix_caching=True)


def shared(blocks: list[int], start: int = 4, used: int = 3) -> Step:
    """The second request begins after `start` tokens that it shares, in the first of these blocks."""
    return step(1, used=used, running=2, chunks={1: Chunk(start, 6 - start, True)}, blocks={1: blocks})


def test_a_block_may_have_several_owners_if_it_holds_the_same_tokens():
    account = checker(SHARING, content=Content([5], 4))
    account.check(shared([0, 2]))
    account.states[0].request.outcome = CANCELLED
    account.check(step(2, used=2, running=1, dropped=[0], joined={1: 6}, decodes=1, kv_tokens=6, kv_squares=36))
    with pytest.raises(
        IntegrityError, match=r"owners of block 0, which it is given\n  expected  \[\]\n  found     \[1"
    ):
        account.check(step(3, chunks={2: Chunk(0, 3, False)}, blocks={2: [0]}))


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (shared([1, 2]), "request 1: whether block 1, which it shares, is full\n  expected  True\n  found     False"),
        (shared([5, 2]), "request 1: whether block 5, which it shares, is full"),
        (shared([0, 2], start=3), "request 1: tokens by which its first chunk misses the start of a block"),
    ],
)
def test_a_block_that_does_not_hold_the_prefix_may_not_be_shared(wrong, complaint):
    with pytest.raises(IntegrityError, match=re.escape(complaint)):
        checker(SHARING, content=Content([5], 4)).check(wrong)


def test_a_block_of_another_text_or_place_may_not_be_shared():
    account = checker(SHARING, content=Content([5], 4))
    account.states[1].request.content = Content([6], 4)
    with pytest.raises(IntegrityError, match="first 4 tokens are request 0's, who wrote block 0"):
        account.check(shared([0, 2]))
    account = checker(SHARING, prompt_len=8, content=Content([5], 8))
    with pytest.raises(IntegrityError, match="place in the prompt of block 1, which it shares"):
        account.check(step(1, used=3, running=2, chunks={1: Chunk(4, 4, True)}, blocks={1: [1, 2]}))


def test_a_shared_block_may_not_be_written():
    account = checker(SHARING, content=Content([5], 4))
    account.check(shared([0, 2]))
    account.states[1].cached = 3  # as if it were to compute the last token of its prefix anew
    with pytest.raises(IntegrityError, match=r"owners of block 0, which it writes\n.*\[1\]\n.*\[0, 1\]"):
        account.check(step(2, used=3, running=2, chunks={1: Chunk(3, 4, True)}))


# -- a whole run, on either backend ----------------------------------------------------------------------------

REQUESTS = [TraceRequest(i, i, prompt_len=20, output_len=10, max_tokens=12) for i in range(6)]
LIMITS = ServingConfig(num_blocks=20, block_size=8, max_seqs=4, max_batched_tokens=64, max_model_len=64)


def serve(policy: type[Scheduler], check: bool, config: ServingConfig = LIMITS) -> None:
    backend = SimBackend(env := simpy.Environment(), REQUESTS, ProfiledTiming(small_profile()))
    checked = CheckedBackend(backend, config) if check else backend
    env.run(until=env.process(Instance(policy(config), checked, Recorder()).serve()))


class Deaf(ChunkedPrefill):
    """Does not hear that requests have stopped."""

    def stopped(self, request_id: int) -> None:
        self.running[request_id].outcome = STOP


class Stingy(ChunkedPrefill):
    """Hands out a block that somebody has."""

    def schedule(self, now: int) -> Step | None:
        made = super().schedule(now)
        if made and made.index == 3:
            return dataclasses.replace(made, blocks={max(self.running): [0]})
        return made


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [(Deaf, "have stopped or were cancelled, and still hold blocks"), (Stingy, "owners of block 0, which it is given")],
)
def test_both_backends_end_at_the_first_wrong_step_and_name_the_policy(
    policy, complaint, executor: Executor, monkeypatch
):
    said = []
    with pytest.raises(IntegrityError) as caught:
        serve(policy, check=True)
    said.append(str(caught.value))
    config = dataclasses.replace(LIMITS, scheduler=f"{__name__}:{policy.__name__}")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    with pytest.raises(IntegrityError) as caught:
        serve_for_real(executor, REQUESTS, config, check=True)
    said.append(str(caught.value))
    for each in said:
        assert re.match(rf"{policy.__name__} \(.*{HERE}:\d+\) breaks an invariant in step \d+: ", each)
        assert complaint in each
        assert len(each.splitlines()) == 3


# -- blame -----------------------------------------------------------------------------------------------------


class Raises(Fcfs):
    def plan(self, now: int) -> None:
        _ = self.running[77]  # here


class RaisesOnArrival(Fcfs):
    def arrive(self, request: Request) -> None:
        raise RuntimeError("no room for you")  # here


class RaisesInVictim(Fcfs):
    def victim(self) -> Request:
        return max(self.running.values(), key=lambda request: request.beauty)  # here


class SchedulesTheDead(ChunkedPrefill):
    def __init__(self, config: ServingConfig) -> None:
        super().__init__(config)
        self.seen: dict[int, Request] = {}

    def arrive(self, request: Request) -> None:
        super().arrive(request)
        self.seen[request.id] = request

    def plan(self, now: int) -> None:
        self.decode()
        for request in self.seen.values():
            if request.id not in self.decoding:
                self.prefill(request)  # here


class PreemptsTheDead(SchedulesTheDead):
    def plan(self, now: int) -> None:
        ChunkedPrefill.plan(self, now)
        for request in self.seen.values():
            if request.outcome:
                self.preempt(request)  # here


class PreemptsTheWaiting(Fcfs):
    def plan(self, now: int) -> None:
        self.preempt(next(iter(self.waiting.values())))  # here


class ChoosesNoVictim(Fcfs):
    def victim(self) -> Request:
        return next(iter(self.waiting.values()))

    def plan(self, now: int) -> None:
        super().plan(now)


class OverBudget(ChunkedPrefill):
    chunked = False

    def plan(self, now: int) -> None:
        super().plan(now)
        for request_id, chunk in tuple(self._step.chunks.items()):
            self._step.chunks[request_id] = chunk._replace(tokens=chunk.tokens + 100)


class Lazy(Fcfs):
    def plan(self, now: int) -> None:
        """Never runs anything."""


class Fickle(ChunkedPrefill):
    """Goes on with one request until another is admitted, and never lets it finish its prefill."""

    def plan(self, now: int) -> None:
        oldest, *others = self.running.values() or [None]
        if others:
            self.preempt(oldest)  # here
            self.prefill(others[0])
        else:
            self.prefill(next(reversed(self.waiting.values())))


SMALL = dataclasses.replace(LIMITS, num_blocks=7)
GUILTY = [
    (Raises, LIMITS, "raised KeyError: 77"),
    (RaisesOnArrival, LIMITS, "raised RuntimeError: no room for you"),
    (RaisesInVictim, SMALL, "raised AttributeError: 'Request' object has no attribute 'beauty'"),
    (SchedulesTheDead, LIMITS, r"schedules request 0, which has ended \(stop\)"),
    (PreemptsTheDead, LIMITS, r"preempts request 0, which has ended \(stop\)"),
    (PreemptsTheWaiting, LIMITS, "preempts request 0, which is not running"),
    (ChoosesNoVictim, SMALL, r"preempts request \d, which is not running"),
    (OverBudget, LIMITS, "plans 120 tokens in step 0: max_batched_tokens is 64"),
    (Lazy, LIMITS, "plans nothing, but 6 requests wait"),
]


def test_a_policy_that_preempts_for_ever_is_named():
    with pytest.raises(PolicyError, match=r"Fickle \(.*\) starves everyone: it has preempted 4001 times since"):
        serve(Fickle, check=False, config=dataclasses.replace(LIMITS, max_batched_tokens=4))


@pytest.mark.parametrize("check", [False, True], ids=["unchecked", "checked"])
@pytest.mark.parametrize(("policy", "config", "deed"), GUILTY, ids=lambda each: getattr(each, "__name__", ""))
def test_a_policy_that_fails_breaks_a_rule_or_starves_everyone_is_named_with_file_and_line(policy, config, deed, check):
    with pytest.raises(PolicyError, match=deed) as caught:
        serve(policy, check, config)
    name, place = re.match(rf"(\w+) \(.*{HERE}:(\d+)\) ", str(caught.value)).groups()
    assert name == policy.__name__
    line = Path(__file__).read_text().splitlines()[int(place) - 1]
    assert "# here" in line or line.startswith(f"class {name}") or "super().plan(now)" in line


class Stillborn(Fcfs):
    def __init__(self, config: ServingConfig) -> None:
        super().__init__(config.limits)  # here


def test_a_policy_that_cannot_be_made_is_named():
    config = dataclasses.replace(LIMITS, scheduler=f"{__name__}:Stillborn")
    with pytest.raises(PolicyError, match=rf"Stillborn \(.*{HERE}:\d+\) raised AttributeError: .*'limits'"):
        load_scheduler(config)


def test_a_failing_backend_is_no_policys_fault():
    class Broken(SimBackend):
        def launch(self, step):
            raise OSError("no power")

    backend = Broken(env := simpy.Environment(), REQUESTS, ProfiledTiming(small_profile()))
    with pytest.raises(OSError, match="no power"):
        env.run(until=env.process(Instance(Fcfs(LIMITS), backend, Recorder()).serve()))


@pytest.mark.parametrize("command", ["simulate", "run"])
def test_the_command_line_says_it_in_a_line_and_exits_with_2(command, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from engine.scheduler.policies.fcfs import Fcfs\n\n"
        "class Mine(Fcfs):\n    def plan(self, now):\n        super().plan(now)\n        1 / (now < 10**7)\n"
    )
    (tmp_path / "t.jsonl").write_text('{"arrival_s": 0, "prompt_len": 9, "output_len": 90}\n')
    where = ["--profile", "a100-80gb/llama-3-8b"]
    if command == "run":
        tiny_model().save_pretrained(tmp_path / "model")
        where = ["--device", "cpu", "--threads", "1", "--model", "model"]
    args = ["--trace", "t.jsonl", "--scheduler", "mine:Mine", "--max-model-len", "128", "--check", "--out", "o"]
    tandem = Path(sys.executable).with_name("tandem")
    done = subprocess.run([tandem, command, *where, *args], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("mine.py:6) raised ZeroDivisionError: division by zero")
    assert f"tandem: Mine ({tmp_path}/mine.py:6) raised" in done.stderr
