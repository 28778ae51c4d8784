"""The simulator on live time: its clock runs no faster than the wall's, and its requests come from clients.

Decisions follow from simulated time and from when events were delivered, never from how long the host took: an offline
simulation that is given the deliveries repeats the run exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import simpy

from engine.backend import Observer
from engine.config import ServingConfig
from engine.instance import Instance
from engine.live_events import LiveEvents
from engine.request import unknown_token
from engine.scheduler import Scheduler
from engine.stop_condition import StopCondition
from sim.backend import SimBackend
from sim.device_timing import DeliveredTiming
from sim.profile.format import Profile
from traces.request import TraceRequest


class PacedEnvironment(simpy.Environment):  # type: ignore[misc]
    """A SimPy environment in nanoseconds that waits for the wall clock before each event.

    It does not fail where the wall is ahead, as SimPy's own does: it goes on as fast as it can.

    Attributes:
        start_ns: when the clock stood at 0, by `time.perf_counter_ns`.
        lag_ns: how far the wall was ahead at worst.
    """

    def __init__(self) -> None:
        super().__init__(initial_time=0)
        self.start_ns = time.perf_counter_ns()
        self.lag_ns = 0

    def wall_ns(self) -> int:
        """Nanoseconds since the start, in truth."""
        return time.perf_counter_ns() - self.start_ns

    def step(self) -> None:
        """Process the next event when its time has come."""
        ahead = int(self.peek()) - self.wall_ns()
        if ahead > 0:
            time.sleep(ahead / 1e9)
        else:
            self.lag_ns = max(self.lag_ns, -ahead)
        super().step()


@dataclass(eq=False)
class RealtimeDriver:
    """Implements `engine.server.driver.Driver`: the times of a profile, and filler text of the right length.

    A request makes `max_tokens` tokens, or as many as its client tells or `draw` says, whatever is the least.

    Attributes:
        filler: the token ids that every output repeats.
        vocab_size: of the tokenizer that they are from.
        draw: where the request of a number meets its end-of-sequence, for those that heed it; None: nowhere.
        prompts: token ids by request, if `keep_prompts` is set.
    """

    profile: Profile
    config: ServingConfig
    filler: Sequence[int]
    vocab_size: int
    draw: Callable[[int], int] | None = None
    keep_prompts: bool = False

    def __post_init__(self) -> None:
        named = {"device": self.profile.meta.device, "model": self.profile.model.name}
        self.facts: dict[str, Any] = {"backend": "sim", **named, "vocab_size": self.vocab_size, "stop_tokens": ()}
        self.prompts: dict[int, Sequence[int]] = {}
        self._env = PacedEnvironment()
        self._events = LiveEvents(self._env.wall_ns, self._admit)
        self._backend = SimBackend(self._env, (), DeliveredTiming(self.profile), self._events)

    @property
    def lag_ns(self) -> int:
        """How far simulated time fell behind the wall clock, at worst."""
        return self._env.lag_ns

    def token(self, request_id: int, position: int) -> int:
        """As in `Driver`."""
        return self.filler[position % len(self.filler)]

    def forget(self, request_id: int) -> None:
        """As in `Driver`."""
        self._backend.outputs.forget(request_id)

    def serve(self, scheduler: Scheduler, observer: Observer, begun: Callable[[LiveEvents, int], None]) -> None:
        """As in `Driver`."""
        begun(self._events, self._env.start_ns)
        self._env.run(until=self._env.process(Instance(scheduler, self._backend, observer).serve()))

    def _admit(self, source: TraceRequest, condition: StopCondition) -> str | None:
        if self.keep_prompts and source.prompt_token_ids is not None:
            self.prompts[source.id] = source.prompt_token_ids
        lengths = [source.max_tokens]
        if condition.output_len is not None:
            lengths.append(condition.output_len)
        elif self.draw is not None and not condition.ignore_eos:
            lengths.append(max(self.draw(source.id), condition.min_tokens))
        self._backend.outputs.seen(replace(source, output_len=min(lengths)))
        return unknown_token(source, self.vocab_size)
