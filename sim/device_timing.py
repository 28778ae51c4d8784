"""When things happen in a simulation: as a latency profile predicts, or as a real run recorded.

Both answer in absolute nanoseconds, and say when the serving loop goes on: the host's time between taking
notice of something and reading the clock again is charged there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

from engine.backend import Launch
from engine.copy_order import CopyOrder
from engine.step import Step
from sim.latency_model import PARTS, LatencyModel
from sim.profile.format import HOST_TERMS, HOST_TERMS_BY_KIND, Profile


class Timing(Protocol):
    """What a simulated backend asks. The last value of what it is told is when the loop goes on."""

    def launch(self, step: Step, now: int) -> tuple[Launch, int]:
        """The host launches a step."""

    def complete(self, now: int) -> tuple[int, int, int, int]:
        """The host waits for the oldest step in flight: when it notices, when the device began, how long it worked."""

    def wake(self, due_ns: int) -> int:
        """The host, idle, is woken by an event that is due at `due_ns`; returns when the loop goes on."""


class ProfiledTiming:
    """Times as a profile predicts: the device runs steps back to back, the host overlaps it as the loop lets it.

    Copies between the tiers are a resource of their own, which works beside the compute that does not depend on them.
    """

    def __init__(self, profile: Profile, ignore: Collection[str] = ()) -> None:
        """`ignore`: as in `LatencyModel`, and `host`, which makes the host take no time."""
        self.latency = LatencyModel(profile, ignore)
        self._host = _HostTimes(profile, "host" in ignore)
        self._device_free_ns = 0
        self._copies = CopyOrder()
        self._copies_free_ns = 0
        self._copied_ns: dict[int, int] = {}  # by step, of copies that no compute has waited for yet
        self._in_flight: deque[tuple[int, int, int, int]] = deque()

    def launch(self, step: Step, now: int) -> tuple[Launch, int]:
        """The device starts once the step is launched, and its predecessor and the copies that it needs are done."""
        plan_ns, launch_ns, notice_ns, turn_ns, _ = self._host.of(step)
        planned = now + plan_ns
        launched = planned + launch_ns
        copies_ns = 0
        if step.swapped_out or step.swapped_in or self._copied_ns:
            copies_ns = self._copy(step, launched)
        if step.decodes or step.chunks:
            start = max(launched, self._device_free_ns)
            device_ns = self.latency.device_ns(step, start)
            self._device_free_ns = start + device_ns
        else:
            device_ns = copies_ns
            start = self._copies_free_ns - device_ns
        self._in_flight.append((start, device_ns, notice_ns, turn_ns))
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

    def complete(self, now: int) -> tuple[int, int, int, int]:
        """The host notices a little after the device's end, or at once if that is past."""
        start, device_ns, notice, turn = self._in_flight.popleft()
        completed = max(now, start + device_ns + notice)
        return completed, start, device_ns, completed + turn

    def wake(self, due_ns: int) -> int:
        """Timers are late."""
        return due_ns + self._host.of(Step(0))[-1]


class DeliveredTiming(ProfiledTiming):
    """As a profile predicts, for events whose times are those of their delivery: an idle host wakes right then."""

    def wake(self, due_ns: int) -> int:
        """How late the host wakes is in the time already."""
        return due_ns


class _HostTimes:
    """The host's terms in nanoseconds, by kind of step, sequences, and requests with a chunk."""

    def __init__(self, profile: Profile, none: bool) -> None:
        self._curves = {(term, kind): profile.host(term, kind) for term in HOST_TERMS for kind in ("decode", "prefill")}
        self._none = none
        self._known: dict[tuple[int, int], tuple[int, ...]] = {}

    def of(self, step: Step) -> tuple[int, ...]:
        """`HOST_TERMS`, in order; for a number of sequences outside the measured, those of the nearest that was."""
        key = len(step.chunks), step.load.running
        times = self._known.get(key)
        if times is None:
            times = self._known[key] = tuple(self._ns(term, *key) for term in HOST_TERMS)
        return times

    def _ns(self, term: str, chunks: int, running: int) -> int:
        curve = self._curves[term, "prefill" if chunks else "decode"]
        sequences = chunks if chunks and term in HOST_TERMS_BY_KIND else running
        return 0 if self._none else round(1000 * curve(min(max(sequences, curve.xs[0]), curve.xs[-1])))


class ReplayOver(Exception):
    """The recorded times are used up, or the decisions differ from the recorded ones so that no time fits."""


class RecordedTiming:
    """The times of a recorded run, iteration by iteration, and of its decisions nothing.

    With a latency model, `device_ns` is its prediction for the batch at hand, beside the recorded notice.

    Attributes:
        parts_us: of each step, as the latency model has them.
    """

    def __init__(
        self, iterations: Sequence[dict[str, Any]], device: Sequence[tuple[int, int]], latency: LatencyModel | None
    ) -> None:
        self._iterations = iterations
        self._latency = latency
        self.parts_us: list[dict[str, float]] = []
        self._turn = 0
        self._in_flight: deque[tuple[int, int] | None] = deque()
        self._device: Iterator[tuple[int, int]] = iter(device)

    @property
    def start_ns(self) -> int:
        """The first clock read."""
        return int(self._row["now_ns"])

    @property
    def _row(self) -> dict[str, Any]:
        if self._turn >= len(self._iterations):
            raise ReplayOver
        return self._iterations[self._turn]

    def launch(self, step: Step, now: int) -> tuple[Launch, int]:
        """The recorded launch of this iteration. Raises ReplayOver if the recorded run launched nothing here."""
        row = self._row
        if row["launched_ns"] is None:
            raise ReplayOver
        self._in_flight.append(self._work(step))
        launch = Launch(row["planned_ns"], row["launched_ns"])
        return launch, launch.launched_ns if row["completed_ns"] is not None else self._next_read(launch.launched_ns)

    def _work(self, step: Step) -> tuple[int, int] | None:
        """When the device began a step and how long it worked, as recorded or as predicted; None if it was cut off."""
        if (recorded := next(self._device, None)) is None:
            return None
        start, device_ns = recorded
        if self._latency:
            device_ns, parts = self._latency.predict(step, start)
            self.parts_us.append(dict(zip(PARTS, parts, strict=False)))
        return start, device_ns

    def complete(self, now: int) -> tuple[int, int, int, int]:
        """The recorded completion of this iteration. Raises ReplayOver if the recorded run waited for none here."""
        completed, work = self._row["completed_ns"], self._in_flight.popleft()
        if completed is None or work is None:
            raise ReplayOver
        return completed, *work, self._next_read(completed)

    def wake(self, due_ns: int) -> int:
        """When the recorded run woke up. Raises ReplayOver if it was over by then."""
        if self._turn + 1 >= len(self._iterations):
            raise ReplayOver
        return self._next_read(due_ns)

    def _next_read(self, otherwise: int) -> int:
        """The next iteration's clock read; after the last there is none, and the next question ends the replay."""
        self._turn += 1
        return int(self._row["now_ns"]) if self._turn < len(self._iterations) else otherwise
