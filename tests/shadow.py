"""A second bookkeeper that sees only Steps and checks that each is one a data plane could run."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.config import ServingConfig
from engine.recorder import Recorder
from engine.request import Request
from engine.scheduler import load_scheduler
from engine.scheduler.base import Scheduler
from engine.serving_loop import serving_loop
from engine.step import Copies, Step
from sim.backend import SimBackend
from sim.profile import HOST_TERMS, Profile
from sim.timing import ProfiledTiming, Timing
from traces.request import TraceRequest


@dataclass
class Mirror:
    """One request as the data plane knows it."""

    source: TraceRequest
    cached: int = 0
    made: int = 0
    blocks: list[int] = field(default_factory=list)
    cpu_blocks: list[int] = field(default_factory=list)
    arrived_in: int = -1  # the step that swapped it in


class Shadow:
    """Applies deltas and asserts every invariant of a step, blocks owned in plan order."""

    def __init__(self, requests: list[TraceRequest], config: ServingConfig) -> None:
        self.config = config
        self.mirrors = {source.id: Mirror(source) for source in requests}
        self.decoding: dict[int, None] = {}
        self.owner: dict[int, int] = {}
        self.cpu_owner: dict[int, int] = {}
        self.steps = 0
        self.swaps = 0

    def check(self, step: Step) -> None:
        assert step.index == self.steps
        self.steps += 1
        for request_id in (*step.dropped, *step.preempted):
            self._free(request_id)
            self.mirrors[request_id].cached = 0
        for request_id, copies in step.swapped_out.items():
            self._swap_out(request_id, copies)
        returned = [block for copies in step.swapped_in.values() for block in copies.source]
        for request_id, copies in step.swapped_in.items():
            self._swap_in(request_id, copies, step.index)
        assert not {*returned} & {block for copies in step.swapped_out.values() for block in copies.target}
        for request_id, blocks in step.blocks.items():
            self._own(request_id, blocks)
        for request_id, context in step.joined.items():
            assert context == self.mirrors[request_id].cached
            assert request_id not in self.decoding
            assert self.mirrors[request_id].arrived_in < step.index
            self.decoding[request_id] = None
        self._run(step)
        for request_id in step.finishing:
            assert self.mirrors[request_id].made == self.mirrors[request_id].source.max_tokens
            self._free(request_id)

    def _own(self, request_id: int, blocks: list[int]) -> None:
        for block in blocks:
            assert 0 <= block < self.config.num_blocks
            assert block not in self.owner, f"block {block} owned by {self.owner[block]} given to {request_id}"
            self.owner[block] = request_id
        self.mirrors[request_id].blocks += blocks

    def _swap_out(self, request_id: int, copies: Copies) -> None:
        """Exactly the blocks of its cache leave, and all but its newest token are in it: no half prefill is kept."""
        mirror = self.mirrors[request_id]
        assert mirror.made and not mirror.cpu_blocks
        assert mirror.cached == mirror.source.prompt_len + mirror.made - 1
        assert copies.source == mirror.blocks[: -(-mirror.cached // self.config.block_size)]
        assert len(copies.target) == len(copies.source)
        self._free(request_id)
        for block in copies.target:
            assert 0 <= block < self.config.num_cpu_blocks and block not in self.cpu_owner
            self.cpu_owner[block] = request_id
        mirror.cpu_blocks = copies.target
        self.swaps += 1

    def _swap_in(self, request_id: int, copies: Copies, step: int) -> None:
        mirror = self.mirrors[request_id]
        assert copies.source == mirror.cpu_blocks and len(copies.target) == len(copies.source)
        self._free_cpu(mirror)
        mirror.arrived_in = step
        self._own(request_id, copies.target)

    def _free_cpu(self, mirror: Mirror) -> None:
        for block in mirror.cpu_blocks:
            assert self.cpu_owner.pop(block) == mirror.source.id
        mirror.cpu_blocks = []

    def _free(self, request_id: int) -> None:
        mirror = self.mirrors[request_id]
        for block in mirror.blocks:
            assert self.owner.pop(block) == request_id
        mirror.blocks = []
        self._free_cpu(mirror)
        self.decoding.pop(request_id, None)

    def _run(self, step: Step) -> None:
        assert step.decodes in (0, len(self.decoding))
        assert step.chunks or step.decodes or step.swapped_in or step.swapped_out
        assert (step.kind == "swap") == (not step.chunks and not step.decodes)
        assert step.prefill_tokens + step.decodes <= self.config.max_batched_tokens
        holders = sum(bool(mirror.blocks) for mirror in self.mirrors.values())
        assert holders == step.running <= self.config.max_seqs
        assert len(self.owner) == step.kv_blocks_used
        for request_id, chunk in step.chunks.items():
            mirror = self.mirrors[request_id]
            assert request_id not in self.decoding
            assert chunk.start == mirror.cached
            known = mirror.source.prompt_len + mirror.made
            assert chunk.samples == (chunk.start + chunk.tokens == known)
            self._cache(mirror, chunk.tokens, makes=chunk.samples)
        if step.decodes:
            contexts = [self.mirrors[each].cached for each in self.decoding]
            assert (step.kv_tokens, step.kv_squares) == (sum(contexts), sum(context**2 for context in contexts))
            for request_id in self.decoding:
                self._cache(self.mirrors[request_id], 1, makes=True)

    def _cache(self, mirror: Mirror, tokens: int, makes: bool) -> None:
        mirror.cached += tokens
        mirror.made += makes
        assert mirror.cached <= len(mirror.blocks) * self.config.block_size
        assert mirror.made <= mirror.source.max_tokens


class CheckedBackend(SimBackend):
    """The simulated backend, with every step checked before it runs."""

    shadow: Shadow

    def launch(self, step: Step):
        self.shadow.check(step)
        return super().launch(step)


def serve(
    requests: list[TraceRequest],
    config: ServingConfig,
    timing: Timing | None = None,
    scheduler: Scheduler | None = None,
) -> tuple[Recorder, list[Request]]:
    """Serve in checked simulation; returns the records and the scheduler's requests in order of id."""
    import simpy

    env = simpy.Environment(initial_time=0)
    backend = CheckedBackend(env, requests, timing or ProfiledTiming(small_profile()))
    backend.shadow = Shadow(requests, config)
    recorder = Recorder()
    scheduler = scheduler or load_scheduler(config)
    env.run(until=env.process(serving_loop(backend, scheduler, recorder)))
    assert scheduler.pool.used == 0 and scheduler.cpu_pool.used == 0, "blocks were lost"
    holders = {*backend.shadow.owner.values(), *backend.shadow.cpu_owner.values()}
    assert holders <= {*scheduler._step.dropped}, "only who ended after the last step, which nobody was told"
    return recorder, [life.request for _, life in sorted(recorder._lives.items())]


def small_profile(scale: float = 1.0) -> Profile:
    """Step times with round numbers: 1 ms + 10 us a token, 0.1 us a KV token. For decisions, not for fidelity."""

    def rows(**columns: list[float]) -> list[dict[str, float]]:
        names = list(columns)
        return [
            dict(zip(names, values, strict=True)) | {"spread": 0.0} for values in zip(*columns.values(), strict=True)
        ]

    dense = [row | {"op": "all"} for row in rows(tokens=[1, 4096], time_us=[1010 * scale, (1000 + 40960) * scale])]
    grid = [(x, y) for x in (1, 4096) for y in (0, 4096)]
    prefill = rows(chunk=[x for x, _ in grid], context=[y for _, y in grid], time_us=[x * y * 1e-4 for x, y in grid])
    decode = rows(
        sequences=[1, 1, 256, 256],
        kv_tokens=[1, 4096, 256, 256 * 4096],
        unevenness=[1, 1, 1, 1],
        time_us=[0.1 * scale, 409.6 * scale, 25.6 * scale, 25.6 * 4096 * scale],
    )
    head = rows(samples=[1, 256], time_us=[100 * scale, 200 * scale])
    swap = rows(blocks=[1, 64], time_us=[50 * scale, 50 * 64 * scale])
    host = [{"term": term, "kind": "any", "sequences": 1, "time_us": 20.0, "spread": 0.0} for term in HOST_TERMS]
    tables = {
        "dense": dense,
        "prefill_attention": prefill,
        "decode_attention": decode,
        "head": head,
        "host": host,
        "swap": [row | {"direction": "out"} for row in swap] + [row | {"direction": "in"} for row in swap],
    }
    return Profile({"device": "test", "model": {"name": "small"}, "dtype": "float32", "source": "invented"}, tables)
