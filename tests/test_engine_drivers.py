"""Both backends behind a server's engine: what one request asks for is its own affair, and they answer alike."""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import Pipe
from queue import SimpleQueue
from threading import Thread

import pytest
from served import eventually
from test_executor import executor
from test_live import assert_replay_is_the_same

from analysis.bench.server_path import steady_profile
from engine.config import ServingConfig
from engine.executor.executor import Executor
from engine.records.run_folder import RunRecords
from engine.server.driver import Driver
from engine.server.engine_process import _serve
from engine.server.executor_driver import ExecutorDriver
from engine.server.messages import Arrive, Cancel, Close, Progress, Ready
from engine.stop_condition import StopCondition
from sim.realtime import RealtimeDriver
from traces.request import TraceRequest

LIMITS = ServingConfig(num_blocks=60, block_size=8, max_seqs=4, max_batched_tokens=130, max_model_len=200)
VOCABULARY = 101  # the tiny model's
BACKENDS = ("sim", "real")

__all__ = ["executor"]  # a fixture


def build(backend: str, executor: Executor, config: ServingConfig) -> Driver:
    if backend == "real":
        return ExecutorDriver(executor, config, keep_prompts=True)
    return RealtimeDriver(steady_profile(2000), config, filler=[7, 8, 9], vocab_size=VOCABULARY)


class Engine:
    """The engine's process, as a thread: takes requests, and gathers what it says of them."""

    records = True

    def __init__(self, driver: Driver) -> None:
        self.pipe, self._its = Pipe()
        self.said: SimpleQueue = SimpleQueue()
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, tuple[str, str | None]] = {}
        self.numbers = itertools.count()
        self.config = driver.config
        self.thread = Thread(target=_serve, args=(self, driver, self._its, self.said), daemon=True)
        self.thread.start()
        self.ready = self.said.get(timeout=60)
        assert isinstance(self.ready, Ready)

    def ask(self, prompt: list[int], max_tokens: int = 10, terms: StopCondition = StopCondition()) -> int:  # noqa: B008 (immutable)
        number, now = next(self.numbers), time.perf_counter_ns() - self.ready.start_ns
        self.pipe.send([Arrive(TraceRequest(number, now, len(prompt), max_tokens, max_tokens, prompt), terms)])
        return number

    def cancel(self, number: int) -> None:
        self.pipe.send([Cancel(number, time.perf_counter_ns() - self.ready.start_ns, "gone")])

    def answer(self, number: int) -> tuple[list[int], str, str | None]:
        """Its tokens, how it ended, and why."""
        while number not in self.ends:
            said = self.said.get(timeout=30)
            assert isinstance(said, Progress)
            for each, token in zip(said.ids, said.tokens, strict=True):
                self.tokens.setdefault(each, []).append(token)
            self.ends |= {end.request_id: (end.outcome, end.reason) for end in said.ended}
        return self.tokens.get(number, []), *self.ends[number]

    def close(self) -> RunRecords:
        """Serves what came; returns the records."""
        self.pipe.send([Close()])
        self.thread.join(30)
        assert not self.thread.is_alive()
        return self.run

    def keep(self, recorder, start_ns: int, partial: bool) -> None:
        self.run = RunRecords({}, recorder.tables(), partial=partial)


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """The engine changes when its process looks for garbage, which here is the tests'."""
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()
    gc.enable()


@pytest.fixture(params=BACKENDS)
def start(request, executor) -> Iterator[Callable[..., Engine]]:
    """Starts an engine on either backend, with other limits if need be; all have ended when the test has."""
    engines = []

    def start(**limits) -> Engine:
        engines.append(Engine(build(request.param, executor, replace(LIMITS, **limits))))
        return engines[-1]

    yield start
    for engine in engines:
        engine.pipe.close()
        engine.thread.join(30)


# -- faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "bad",
    [[5, VOCABULARY], [2**31 - 1], [5, -1, 6], [5] * 250],
    ids=["the first that it lacks", "the largest id", "a negative id", "too long"],
)
def test_a_request_that_cannot_be_served_is_rejected_alone(start, depth, bad):
    engine = start(pipeline_depth=depth)
    alone = engine.answer(engine.ask([5, 6, 7]))
    before, rejected, after = engine.ask([5, 6, 7]), engine.ask(bad), engine.ask([5, 6, 7])
    tokens, outcome, reason = engine.answer(rejected)
    assert (tokens, outcome) == ([], "rejected") and reason
    assert [engine.answer(each) for each in (before, after)] == [alone] * 2
    assert engine.answer(engine.ask([5, 6, 7])) == alone, "it still serves"
    run = engine.close()
    assert run.tables["requests"]["outcome"].to_pylist() == ["length", "length", "rejected", "length", "length"]
    assert run.tables["requests"]["reason"].to_pylist()[2] == reason
    assert not run.partial
    assert_replay_is_the_same(run, engine.config)


def test_a_client_may_go_away_at_any_moment(start):
    engine = start(pipeline_depth=2)
    alone = engine.answer(engine.ask([5, 6, 7], 20))
    stays = [engine.ask([5, 6, 7], 20)]
    for moment in range(12):
        leaver = engine.ask([9] * 40 if moment % 3 else [VOCABULARY], 20)
        time.sleep(moment / 1000)
        engine.cancel(leaver)
        engine.cancel(leaver)
        stays.append(engine.ask([5, 6, 7], 20))
    assert [engine.answer(each) for each in stays] == [alone] * 13
    engine.cancel(stays[0])  # it has ended
    assert_replay_is_the_same(engine.close(), engine.config)


# -- where a request stops ---------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_one_that_stops_a_token_before_max_tokens_is_told_and_recorded_as_stopped(start, depth):
    engine = start(pipeline_depth=depth)
    made, outcome, _ = engine.answer(engine.ask([5, 6, 7], 10, StopCondition(ignore_eos=True, output_len=9)))
    assert (len(made), outcome) == (9, "stop")
    run = engine.close()
    (row,) = run.tables["requests"].to_pylist()
    assert (row["outcome"], row["output_len"], row["wasted_tokens"]) == ("stop", 9, depth - 1)
    assert_replay_is_the_same(run, engine.config)


# -- prefixes ----------------------------------------------------------------------------------------------


def test_prompts_that_begin_alike_share_blocks_and_so_they_do_in_a_replay(start):
    engine = start(prefix_caching=True)
    shared = list(range(3, 43))
    for prompt in (shared, [*shared, 50], [*shared[:20], 99, *shared[21:]], list(range(50, 90))):
        engine.answer(engine.ask(prompt))
    run = engine.close()
    assert run.tables["requests"]["cached_tokens"].to_pylist() == [0, 40, 16, 0]
    assert_replay_is_the_same(run, engine.config)


# -- garbage -----------------------------------------------------------------------------------------------


class Knot:
    """Garbage that is found by a collection alone."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_is_collected_whenever_nobody_waits_for_as_long_as_the_server_lives(start):
    engine = start()
    for _ in range(3):
        engine.answer(engine.ask([5, 6, 7]))
        knots = [Knot() for _ in range(30_000)]  # which outlive the young generations' collections
        last = weakref.ref(knots[-1])
        oldest = weakref.ref(knots[0])
        del knots
        engine.answer(engine.ask([5, 6, 7]))
        eventually(lambda oldest=oldest, last=last: oldest() is None and last() is None)
        assert gc.isenabled()
    engine.close()
