"""When things happen in a simulation, as a latency profile predicts.

Answers are absolute nanoseconds. They say when the serving loop goes on: the host's time between taking notice of
something and reading the clock again is charged there. `sim.replay` answers the same questions from a recorded run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import NamedTuple, Protocol

from engine.backend import Completion, Launch, Shown
from engine.copy_order import CopyOrder
from engine.step import Step
from sim.latency_model import LatencyModel
from sim.profile.format import HOST_TERMS, Profile
from sim.terms import Host


class DeviceTiming(Protocol):
    """What a simulated backend asks. The last value of each answer is when the loop goes on."""

    def launch(self, step: Step, now: int) -> tuple[Launch, int]:
        """The host launches a step."""

    def complete(self, now: int, step: int, shown: Shown) -> tuple[Completion, int]:
        """The host waits for the oldest step in flight, whose index and tokens these are."""

    def wake(self, due_ns: int) -> int:
        """The host, idle, is woken by an event that is due at `due_ns`; returns when the loop goes on."""


class _HostNs(NamedTuple):
    """`HOST_TERMS` of a step, in nanoseconds."""

    plan: int
    launch: int
    notice: int
    turn: int
    wake: int


class ProfiledTiming:
    """Times as a profile predicts: the device runs steps back to back, the host overlaps it as the loop lets it.

    Copies between the tiers are a resource of their own, which works beside the compute that does not depend on them.
    """

    def __init__(self, profile: Profile, ignore: Collection[str] = ()) -> None:
        """`ignore`: as in `LatencyModel`, and `host`, which makes the host take no time."""
        self.latency = LatencyModel(profile, ignore)
        self._host = None if "host" in ignore else Host(profile)
        self._host_times: dict[tuple[int, int], _HostNs] = {}
        self._device_free_ns = 0
        self._copies = CopyOrder()
        self._copies_free_ns = 0
        self._copied_ns: dict[int, int] = {}  # by step, of copies that no compute has waited for yet
        self._in_flight: deque[tuple[int, int, _HostNs]] = deque()

    def _host_ns(self, chunks: int, running: int) -> _HostNs:
        times = self._host_times.get((chunks, running))
        if times is None:
            us = [self._host.us(term, chunks, running) if self._host else 0.0 for term in HOST_TERMS]
            times = self._host_times[chunks, running] = _HostNs(*(round(1000 * each) for each in us))
        return times

    def launch(self, step: Step, now: int) -> tuple[Launch, int]:
        """The device starts once the step is launched, and its predecessor and the copies that it needs are done."""
        host = self._host_ns(len(step.chunks), step.load.running)
        planned = now + host.plan
        launched = planned + host.launch
        copies_ns = 0
        if step.swapped_out or step.swapped_in or self._copied_ns:
            copies_ns = self._copy(step, launched)
        if step.decodes or step.chunks:
            start = launched if launched > self._device_free_ns else self._device_free_ns
            device_ns, _ = self.latency.predict(step, start)
            self._device_free_ns = start + device_ns
        else:
            device_ns = copies_ns
            start = self._copies_free_ns - device_ns
        self._in_flight.append((start, device_ns, host))
        return Launch(planned, launched), launched

    def _copy(self, step: Step, launched: int) -> int:
        """Let the step's copies run, and the device wait for those that its compute needs. Returns what they take."""
        copies_ns = 0
        if step.swapped_out or step.swapped_in:
            copies_ns = self.latency.copies_ns(step)
            copy_start = max(launched, self._device_free_ns, self._copies_free_ns)
            self._copied_ns[step.index] = self._copies_free_ns = copy_start + copies_ns
        if (needed := self._copies.needs(step)) is not None:
            # Later compute is held up too, should this step have none: `CopyOrder` names what to wait for once.
            self._device_free_ns = max(self._device_free_ns, self._copied_ns[needed])
            self._copied_ns = {index: end for index, end in self._copied_ns.items() if index > needed}
        return copies_ns

    def complete(self, now: int, step: int, shown: Shown) -> tuple[Completion, int]:
        """The host notices a little after the device's end, or at once if that is past."""
        start, device_ns, host = self._in_flight.popleft()
        noticed = start + device_ns + host.notice
        completed = now if now > noticed else noticed
        return Completion(step, completed, start, device_ns, *shown), completed + host.turn

    def wake(self, due_ns: int) -> int:
        """Timers are late."""
        return due_ns + self._host_ns(0, 0).wake


class DeliveredTiming(ProfiledTiming):
    """As a profile predicts, for events whose times are those of their delivery: an idle host wakes right then."""

    def wake(self, due_ns: int) -> int:
        """How late the host wakes is in the time already."""
        return due_ns
