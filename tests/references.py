"""Two published schedulers, written anew from their rules, to hold Tandem's policies against.

Nothing of Tandem's schedulers is used: blocks are counted, not owned. A rule in which Tandem differs has a name, and
`ours` exchanges it for Tandem's: a reference with all of them exchanged decides as Tandem's policy, so that the list of
differences in docs/others.md is complete; a reference with one left shows what that one does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import Any

from engine.config import ServingConfig

LISTS = ("decodes", "chunks", "preempted", "swapped_out", "swapped_in", "finished")


@dataclass(eq=False)
class Job:
    """A request: what its client asks for, and how far it is.

    Attributes:
        goal: tokens whose prefill makes its next one: its prompt and, after a preemption, its output so far.
        cached: tokens in the cache.
        made: output tokens.
        uncounted: of these, those that do not count towards `max_tokens`.
        blocks: KV blocks that it holds.
    """

    id: int
    arrival: int
    prompt_len: int
    max_tokens: int
    output_len: int
    goal: int = 0
    cached: int = 0
    made: int = 0
    uncounted: int = 0
    blocks: int = 0

    def __post_init__(self) -> None:
        self.goal = self.prompt_len

    @property
    def known(self) -> int:
        return self.prompt_len + self.made

    @property
    def left(self) -> int:
        return max(self.goal - self.cached, 0)

    @property
    def ended(self) -> bool:
        if self.output_len < self.max_tokens and self.made == self.output_len:
            return True
        return self.made - self.uncounted == self.max_tokens

    def compute(self, tokens: int) -> None:
        """Tokens of it ran; those that reach all that is known make the next."""
        self.cached += tokens
        self.made += self.cached == self.known


class Reference(ABC):
    """A clock that counts steps, the queues, and the log. One step is in flight at a time.

    Args:
        limits: blocks, block size, requests and tokens of a step; nothing else of it is looked at.
        jobs: the workload, in order of arrival.
        ours: rules that are exchanged for Tandem's.
    """

    rules: frozenset[str] = frozenset()

    def __init__(self, limits: ServingConfig, jobs: list[Job], ours: frozenset[str] = frozenset()) -> None:
        assert ours <= self.rules
        self.limits, self.ours = limits, ours
        self.coming, self.waiting = deque(jobs), deque[Job]()
        self.running: list[Job] = []
        self.log: dict[str, list[Any]] = {}

    @abstractmethod
    def plan(self) -> None:
        """Decide a step into `log`, requests for ids."""

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_size)

    def decisions(self, most_ticks: int = 100_000) -> list[dict[str, Any]]:
        """Steps that run or copy something; whom one preempts that does neither is told with the next."""
        steps, carried = [], []
        for tick in range(most_ticks):
            while self.coming and self.coming[0].arrival <= tick:
                self.waiting.append(self.coming.popleft())
            self.log = {name: [] for name in LISTS}
            self.plan()
            self.log["preempted"] = carried + [job.id for job in self.log["preempted"]]
            told = self._run()
            carried = [] if told else self.log["preempted"]
            steps += [{"tick": tick, **self.log}] if told else []
            if not (self.coming or self._unfinished()):
                return steps
        raise AssertionError("the reference does not come to an end")

    def _unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def _run(self) -> bool:
        log = self.log
        for job, _, tokens in log["chunks"]:
            job.compute(tokens)
        for job in log["decodes"]:
            job.compute(1)
        log["finished"] = sorted(job.id for job in self.running if job.ended)
        self.running = [job for job in self.running if not job.ended]
        log["decodes"] = sorted(job.id for job in log["decodes"])
        log["chunks"] = [[job.id, start, tokens] for job, start, tokens in log["chunks"]]
        for name in ("swapped_out", "swapped_in"):
            log[name] = [job.id for job in log[name]]
        return any(log[name] for name in ("decodes", "chunks", "swapped_out", "swapped_in"))


class Sarathi(Reference):
    """sarathi/core/scheduler/sarathi_scheduler.py and what it uses.

    Rules that can be exchanged:
        idle_block: a decode needs a free block, though its next token may need none.
        reserve: a prompt gets all its blocks at its admission, not as its chunks run.
        watermark: an admission leaves 1 % of all blocks free.
        readmit: who lost its blocks in the midst of its prefill may be admitted in the same step, which then runs no
            more of it than what was left before; nor does the preemption keep others out.
        restart: who was preempted may make `max_tokens` tokens more.
    """

    rules = frozenset({"idle_block", "reserve", "watermark", "readmit", "restart"})

    @property
    def free(self) -> int:
        return self.limits.num_blocks - sum(job.blocks for job in self.running)

    @property
    def room(self) -> int:
        chunks = sum(tokens for *_, tokens in self.log["chunks"])
        return self.limits.max_batched_tokens - len(self.log["decodes"]) - chunks

    def plan(self) -> None:
        self.running.sort(key=lambda job: (job.arrival, job.id))
        for job in list(self.running):
            if job in self.running and not job.left:
                self._plan_decode(job)
        for job in list(self.running):
            if job in self.running and job.left:
                self._plan_chunk(job)
        while self.waiting and self._admit(self.waiting[0]):
            pass
        for job in self.log["preempted"]:
            job.cached, job.goal = 0, job.known
        self.log["chunks"] = [(job, job.cached, tokens) for job, _, tokens in self.log["chunks"]]

    def _plan_decode(self, job: Job) -> None:
        needed = self.blocks_for(job.known)
        if self._make_room(job, needed - job.blocks if "idle_block" in self.ours else 1):
            job.blocks = needed
            self.log["decodes"].append(job)

    def _plan_chunk(self, job: Job) -> None:
        tokens = min(job.left, self.room)
        needed = self.blocks_for(job.cached + tokens) - job.blocks
        if tokens and self._make_room(job, needed):
            job.blocks += max(needed, 0)
            self.log["chunks"].append((job, job.cached, tokens))

    def _make_room(self, job: Job, blocks: int) -> bool:
        """Preempt the last of those running behind it, or the job itself if there is none."""
        while self.free < blocks:
            victim = self.running.pop()
            victim.blocks = 0
            victim.uncounted = 0 if "restart" in self.ours else victim.made
            self.waiting.appendleft(victim)
            self.log["preempted"].append(victim)
            if victim is job:
                return False
        return True

    def _admit(self, job: Job) -> bool:
        kept = 0 if "watermark" in self.ours else int(0.01 * self.limits.num_blocks)
        tokens = min(job.left, self.room)
        if "readmit" in self.ours and self.log["preempted"]:
            return False
        if self.free - self.blocks_for(job.known) < kept or len(self.running) >= self.limits.max_seqs or not tokens:
            return False
        job.blocks = self.blocks_for(tokens if "reserve" in self.ours else job.known)
        self.running.append(self.waiting.popleft())
        self.log["chunks"].append((job, job.cached, tokens))
        return True


class SwiftLlm(Reference):
    """swiftllm/server/scheduler.py.

    Rules that can be exchanged:
        stale: the blocks of requests that have finished count until decodes are planned again.
        batch_size: a prefill batch may be as large as `max_batch_size`, however many run; decodes swap the excess out.
        newest_first: of those swapped out in one step, the one that came last is the first to return.
        run_at_once: who is swapped in decodes in the same step.
        cpu: blocks in host memory are not counted; Tandem computes a request again where there are too few.
    """

    rules = frozenset({"stale", "batch_size", "newest_first", "run_at_once", "cpu"})

    def __init__(self, limits: ServingConfig, jobs: list[Job], ours: frozenset[str] = frozenset()) -> None:
        super().__init__(limits, jobs, ours)
        self.swapped = deque[Job]()
        self.counted = 0

    def _unfinished(self) -> bool:
        return super()._unfinished() or bool(self.swapped)

    def plan(self) -> None:
        if not self.swapped and self._prefill():
            return
        self._count()
        self._swap_out()
        if not (self.log["swapped_out"] or self.log["preempted"]):
            self._swap_in()
        resting = self.log["swapped_in"] if "run_at_once" in self.ours else []
        self.log["decodes"] = [job for job in self.running if job not in resting]

    def _count(self) -> None:
        for job in self.running:
            job.blocks = self.blocks_for(job.known)
        self.counted = sum(job.blocks for job in self.running)

    def _prefill(self) -> bool:
        if "stale" in self.ours:
            self.counted = sum(job.blocks for job in self.running)
        tokens, batch, others = 0, 0, len(self.running) if "batch_size" in self.ours else 0
        while self.waiting:
            job = self.waiting[0]
            tokens += job.known
            blocks = self.blocks_for(job.known)
            fits = self.counted + blocks <= self.limits.num_blocks and tokens <= self.limits.max_batched_tokens
            if not fits or others + batch + 1 > self.limits.max_seqs:
                break
            batch += 1
            job.blocks = blocks
            self.counted += blocks
            self.running.append(self.waiting.popleft())
            self.log["chunks"].append((job, 0, job.known))
        return batch > 0

    def _swap_out(self) -> None:
        limits, out = self.limits, []
        while len(self.running) > limits.max_seqs or self.counted > limits.num_blocks:
            victim = self.running.pop()
            self.counted -= victim.blocks
            if "cpu" in self.ours and self._cpu_blocks(*self.swapped, *out, victim) > limits.num_cpu_blocks:
                victim.cached = 0
                self.waiting.appendleft(victim)
                self.log["preempted"].append(victim)
            else:
                out.append(victim)
        self.swapped.extendleft(out if "newest_first" in self.ours else reversed(out))
        self.log["swapped_out"] = out

    def _cpu_blocks(self, *jobs: Job) -> int:
        return sum(self.blocks_for(job.known - 1) for job in jobs)

    def _swap_in(self) -> None:
        while self.swapped and len(self.running) < self.limits.max_seqs:
            job = self.swapped[0]
            job.blocks = self.blocks_for(job.known)
            if self.counted + job.blocks > self.limits.num_blocks:
                break
            self.counted += job.blocks
            self.running.append(self.swapped.popleft())
            self.log["swapped_in"].append(job)
