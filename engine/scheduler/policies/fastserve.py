"""FastServe's skip-join multi-level feedback queue (Wu et al., arXiv 2305.05920), with preemption by swap."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush

from engine.config import ServingConfig
from engine.request import Request
from engine.scheduler.keyed import Key, KeyedScheduler
from traces.errors import TandemError

NS_PER_MS = 1_000_000


@dataclass(slots=True)
class _Place:
    """Where a request stands.

    Attributes:
        level: its queue, 0 is the highest.
        move: the number, among all moves, of the one that brought it there.
        made: output tokens that it had made by then.
        cost: iterations of the quantum that its prefill takes up.
        alarm: the decode tick at which its quantum may be used up.
        since_ns: since when it waits.
    """

    level: int
    move: int
    made: int
    cost: int
    alarm: int = 0
    since_ns: int = 0


class SkipJoinMlfq(KeyedScheduler):
    """Least attained service, without knowing lengths: who has used up its queue's quantum moves one down.

    A request joins the first queue whose quantum holds its prefill, skipping those in which it would only be demoted.
    The highest queues run, each in order of joining; who has to make room is swapped out (recomputed, if there is no
    `--cpu-blocks`). A request that has waited for `starve_ms` moves to the top. The paper counts service in time, of a
    profile; here the unit is one decode iteration, which `prefill_tokens` tokens of prefill are worth, so that
    decisions do not depend on the clock. Its swapping ahead of need is left out.

    Args:
        config: the run's limits.
        levels: number of queues.
        quantum: iterations in the highest queue.
        ratio: of each queue's quantum to that of the queue above.
        prefill_tokens: prompt tokens that cost as much as one decode iteration.
        starve_ms: how long a request may wait before it moves to the highest queue; 0 is for ever. If it is less than
            requests usually wait, all of them move up, and push each other out.

    Raises:
        TandemError: a parameter is out of range.
    """

    chunked = False
    preemptive = True

    def __init__(
        self,
        config: ServingConfig,
        *,
        levels: int = 6,
        quantum: int = 8,
        ratio: int = 2,
        prefill_tokens: int = 128,
        starve_ms: int = 60_000,
    ) -> None:
        super().__init__(config)
        if min(levels, quantum, ratio, prefill_tokens) < 1 or starve_ms < 0:
            raise TandemError("levels, quantum, ratio and prefill_tokens must be 1 or more, and starve_ms 0 or more")
        self.quanta: list[int] = [quantum * ratio**level for level in range(levels)]
        self.prefill_tokens = prefill_tokens
        self.starve_ns = starve_ms * NS_PER_MS
        self._places: dict[int, _Place] = {}
        self._moves = 0
        self._alarms: list[tuple[int, int]] = []  # (decode tick, request): its quantum is not used up before
        self._waits: deque[tuple[int, Request]] = deque()  # (since when, who), longest first
        self._now = 0

    def plan(self, now: int) -> None:
        """Demote whose quantum is used up, promote who starves; then run the highest."""
        self._now = now
        self._demote()
        self._promote()
        super().plan(now)

    def key(self, request: Request) -> Key:
        """Its queue; then the order in which it joined that."""
        place = self._places[request.id]
        return place.level, place.move

    def arrive(self, request: Request) -> None:
        """Skip-join: the first queue whose quantum is not used up by the prefill."""
        cost = -(-request.prompt_len // self.prefill_tokens)
        lowest = len(self.quanta) - 1
        level = next((level for level, quantum in enumerate(self.quanta) if quantum >= cost), lowest)
        self._move(request, level, cost)
        super().arrive(request)
        self._now = max(self._now, request.arrival_ns)
        self._wait(request)

    def preempt(self, request: Request) -> None:
        """Swapped out, it keeps its place in its queue."""
        super().preempt(request)
        self._wait(request)

    def on_admit(self, request: Request) -> None:
        """Watch its quantum."""
        super().on_admit(request)
        self._watch(request)

    def on_leave(self, request: Request) -> None:
        """Forget who has ended."""
        if request.outcome is not None:
            del self._places[request.id]

    def _move(self, request: Request, level: int, cost: int = 0) -> None:
        self._moves += 1
        self._places[request.id] = _Place(level, self._moves, request.generated, cost)

    def _left(self, request: Request) -> int:
        """Iterations left of its quantum; one is left until it has made a token in its queue."""
        place = self._places[request.id]
        made = request.generated - place.made
        left = self.quanta[place.level] - place.cost - made
        return left if made else max(left, 1)

    def _watch(self, request: Request) -> None:
        place = self._places[request.id]
        place.alarm = self.decoding.ticks + self._left(request)
        heappush(self._alarms, (place.alarm, request.id))

    def _demote(self) -> None:
        while self._alarms and self._alarms[0][0] <= self.decoding.ticks:
            alarm, request_id = heappop(self._alarms)
            request = self.running.get(request_id)  # one that waits is watched again once it is admitted
            if request and self._places[request_id].alarm == alarm:
                if self._left(request) <= 0:
                    self._move(request, min(self._places[request_id].level + 1, len(self.quanta) - 1))
                    self.rekey(request)
                self._watch(request)

    def _wait(self, request: Request) -> None:
        if self.starve_ns:
            self._places[request.id].since_ns = self._now
            self._waits.append((self._now, request))

    def _promote(self) -> None:
        while self._waits and self._waits[0][0] + self.starve_ns <= self._now:
            since_ns, request = self._waits.popleft()
            if request.id in self.waiting and self._places[request.id].since_ns == since_ns:
                self._move(request, 0)
                self.rekey(request)
