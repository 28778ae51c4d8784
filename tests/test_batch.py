"""Packed batches: padding changes nothing, sections are where kernels want them, and the running batch is followed."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import simpy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shadow import small_profile
from test_scheduling_properties import configs, schedulers, workloads
from tiny_models import tiny_model

from engine.checks.step_checker import CheckedBackend
from engine.config import ServingConfig
from engine.executor.batch import Decodes, KVCache, Packing, Prefill, Shape, build_batch
from engine.executor.batch_state import RunningBatch, StepWork
from engine.executor.cuda.shapes import Shapes
from engine.executor.kernels import ops
from engine.executor.model import Llama
from engine.executor.weights import load_weights
from engine.instance import Instance
from engine.model.config import load_model_config
from engine.records.recorder import Recorder
from engine.step import Chunk, Copies, Step
from sim.backend import SimBackend
from sim.device_timing import ProfiledTiming
from traces.request import TraceRequest

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK = 16
PACKING = Packing(BLOCK, tile_rows=64, no_table_row=9)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Llama:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(num_attention_heads=2, num_key_value_heads=1).save_pretrained(folder)
    config = load_model_config(folder)
    return Llama(config, load_weights(folder, config, torch.float32, DEVICE), ops)


def mixed_batch() -> tuple[Decodes, list[Prefill]]:
    """Two decodes, the first fed from table row 3, and two chunks, of which the second is not a prompt's last."""
    tables = np.array([[4, 0], [1, 7]], np.int32)
    decodes = Decodes(np.array([-4, 55], np.int32), np.array([20, 5], np.int32), tables, np.array([3, 0], np.int32))
    first = Prefill([7, 8, 9], 0, np.array([2], np.int32), True, 1)
    return decodes, [first, Prefill(list(range(30)), 10, np.array([3, 5, 6], np.int32), False, 2)]


def run(llama: Llama, shape: Shape) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    decodes, prefills = mixed_batch()
    words = np.full(shape.words, 12345, np.int32)
    spans = PACKING.pack(shape.split(words), decodes, prefills)
    spans += [type(spans[0])(0, 0, 0)] * (shape.prefills - len(spans))
    cache = KVCache.allocate(llama.config, 8, BLOCK, torch.float32, DEVICE)
    cache.data.copy_(torch.randn(cache.data.shape, generator=torch.Generator().manual_seed(0)))
    last_tokens = torch.tensor([0, 0, 0, 77, 0, 0, 0, 0, 0, 0], device=DEVICE)
    batch = shape.split(torch.from_numpy(words).to(DEVICE), spans, last_tokens)
    tokens = llama.forward(batch, cache).tolist()
    return tokens, cache.data, last_tokens


def test_padding_changes_neither_tokens_nor_cache(llama):
    exact = PACKING.shape_of(*mixed_batch())
    assert exact == Shape(tokens=35, decodes=2, prefills=2, samples=3, tiles=2, blocks=3)
    tokens, cache, last_tokens = run(llama, exact)
    padded = run(llama, Shape(tokens=48, decodes=20, prefills=5, samples=20, tiles=7, blocks=9))
    assert padded[0][:3] == tokens
    assert torch.equal(padded[1], cache)
    assert torch.equal(padded[2][:9], last_tokens[:9])


def test_tokens_are_noted_in_their_requests_table_rows(llama):
    tokens, _, last_tokens = run(llama, PACKING.shape_of(*mixed_batch()))
    assert [last_tokens[table_row].item() for table_row in (3, 0, 1)] == tokens
    assert last_tokens[2] == 0  # its chunk was not the last


def test_a_token_that_only_the_device_knows_is_fed_like_any_other(llama):
    cache = KVCache.allocate(llama.config, 8, BLOCK, torch.float32, DEVICE)
    cache.data.copy_(torch.randn(cache.data.shape, generator=torch.Generator().manual_seed(0)))
    told = llama.forward(llama.batch([([77], 20, [4, 0])], 1, cache), cache).tolist()
    assert run(llama, PACKING.shape_of(*mixed_batch()))[0][:1] == told


def test_sections_begin_at_aligned_addresses():
    shape = Shape(tokens=35, decodes=2, prefills=2, samples=3, tiles=2, blocks=3)
    words = torch.zeros(shape.words, dtype=torch.int32)
    batch = shape.split(words)
    sections = [section for field in fields(batch) if isinstance(section := getattr(batch, field.name), torch.Tensor)]
    starts = [(section.data_ptr() - words.data_ptr()) for section in sections]
    assert all(start % 128 == 0 for start in starts) and len(set(starts)) == len(starts)
    for number, section in enumerate(sections):
        section.fill_(number)
    assert [int(section.unique()) for section in sections] == list(range(8)), "sections overlap"


def test_a_batch_that_does_not_fit_its_blocks_is_refused():
    with pytest.raises(ValueError, match="request 0: 17 tokens do not fit into 1 blocks"):
        build_batch([(list(range(10)), 7, [0])], 0, BLOCK)
    with pytest.raises(ValueError, match="request 0 is a decode and has 2 tokens"):
        build_batch([([1, 2], 7, [0])], 1, BLOCK)


def running_batch(*prompts: list[int]) -> RunningBatch:
    requests = [TraceRequest(i, 0, len(prompt), 9, 9, prompt) for i, prompt in enumerate(prompts)]
    return RunningBatch(requests, None, 100, ServingConfig(num_blocks=8, max_model_len=32, num_cpu_blocks=8))


def follow(running: RunningBatch, step: Step, *tokens: int) -> StepWork:
    work = running.apply(step)
    running.note(work, [*tokens])
    return work


def test_after_a_swap_a_request_is_fed_from_the_host_even_if_it_does_not_decode_in_the_step_that_it_joins():
    running = running_batch([1, 2, 3], [4])
    follow(running, Step(0, chunks={0: Chunk(0, 3, True)}, blocks={0: [5]}), 50)
    follow(running, Step(1, swapped_out={0: Copies([5], [0])}))
    follow(running, Step(2, swapped_in={0: Copies([0], [6])}))
    follow(running, Step(3, joined={0: 3}, chunks={1: Chunk(0, 1, True)}, blocks={1: [7]}), 60)
    back = follow(running, Step(4, joined={1: 1}, decodes=2), 51, 61)
    assert back.decodes.token_ids.tolist() == [50, 60] and back.decodes.tables.tolist() == [[6], [7]]
    assert (running.apply(Step(5, decodes=2)).decodes.token_ids < 0).all(), "from here on the device knows"


def test_a_request_may_lose_its_blocks_between_joining_and_decoding():
    running = running_batch([1, 2, 3], [4])
    follow(running, Step(0, chunks={0: Chunk(0, 3, True)}, blocks={0: [5]}), 50)
    follow(running, Step(1, joined={0: 3}, chunks={1: Chunk(0, 1, True)}, blocks={1: [6]}), 60)
    left = follow(running, Step(2, swapped_out={0: Copies([5], [0])}, joined={1: 1}, decodes=1), 61)
    assert left.decodes.tables.tolist() == [[6]]


def test_a_request_that_was_admitted_and_preempted_by_one_plan_is_met_when_it_first_runs():
    running = running_batch([1, 2, 3], [4])
    follow(running, Step(0, preempted=[1], chunks={0: Chunk(0, 3, True)}, blocks={0: [5]}), 50)
    (prefill,) = follow(running, Step(1, chunks={1: Chunk(0, 1, True)}, blocks={1: [6]}), 60).prefills
    assert (prefill.token_ids, prefill.table.tolist()) == ([4], [6])


class FollowedBackend(CheckedBackend):
    """Simulates, while a running batch follows the steps as a data plane would, its tokens coming a step late."""

    running: RunningBatch

    def launch(self, step):
        event = super().launch(step)
        work = self.running.apply(step)
        states = self.checker.states
        decoding = [states[each.source.id] for each in work.samplers[: step.decodes]]
        # the step checker is a step ahead: it has counted this step's tokens, and given back what ended
        for row, state in enumerate(decoding):
            assert state.cached in (0, work.decodes.contexts[row] + 1)
            assert work.decodes.tables[row, : len(state.blocks)].tolist() == state.blocks
        for (request_id, chunk), prefill in zip(step.chunks.items(), work.prefills, strict=True):
            known = self._tokens(request_id)
            assert list(prefill.token_ids) == known[chunk.start : chunk.start + chunk.tokens]
            assert prefill.table[: len(states[request_id].blocks)].tolist() == states[request_id].blocks
        for row, sampler in enumerate(work.samplers[: step.decodes]):
            fed = int(work.decodes.token_ids[row])
            position = int(work.decodes.contexts[row])
            truth = self._tokens(sampler.source.id)[position]
            assert (self.table_rows[-1 - fed] if fed < 0 else fed) == truth
        samples = list(work.decodes.table_rows) + [each.table_row for each in work.prefills if each.samples]
        for sampler, table_row in zip(work.samplers, samples, strict=True):
            made = self.made[sampler.source.id]
            made.append((31 * sampler.source.id + 7 * len(made)) % 100)
            self.table_rows[int(table_row)] = made[-1]
        self.pending.append((work, [self.made[each.source.id][-1] for each in work.samplers]))
        return event

    def _tokens(self, request_id):
        return self.running._prompt(self.running._sources[request_id][0]) + self.made[request_id]

    def complete(self):
        self.running.note(*self.pending.pop(0))
        return super().complete()


@settings(max_examples=150, deadline=None)
@given(workloads(), configs(), st.data())
def test_a_running_batch_feeds_every_request_its_own_tokens_and_blocks(requests, config, data):
    env, scheduler = simpy.Environment(), data.draw(schedulers(config))
    backend = FollowedBackend(SimBackend(env, requests, ProfiledTiming(small_profile())), scheduler.config)
    backend.running = RunningBatch(requests, None, 100, config)
    backend.table_rows, backend.pending, backend.made = {}, [], {each.id: [] for each in requests}
    recorder = Recorder()
    env.run(until=env.process(Instance(scheduler, backend, recorder).serve()))
    for request_id, output in backend.running.outputs.items():
        assert output == backend.made[request_id]


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 300).flatmap(lambda seqs: st.tuples(st.just(seqs), st.integers(seqs, 4096))),
    st.lists(st.integers(1, 700), max_size=60),
    st.integers(0, 300),
    st.sampled_from([16, 64, 128]),
)
def test_the_captured_shape_of_a_step_has_room_for_all_of_it(limits, chunks, decodes, tile_rows):
    max_seqs, max_tokens = limits
    config = ServingConfig(num_blocks=9, max_seqs=max_seqs, max_batched_tokens=max_tokens)
    chunks = chunks[:max_seqs]
    decodes = min(decodes, max_seqs - len(chunks))
    while chunks and sum(chunks) + decodes > max_tokens:
        chunks.pop()
    assume(chunks or decodes)
    prefills = [Prefill([0] * tokens, 0, np.zeros(3, np.int32), True) for tokens in chunks]
    integers = np.zeros(decodes, np.int32)
    decoding = Decodes(integers, integers, np.zeros((decodes, 3), np.int32), integers)
    exact = Packing(16, tile_rows, max_seqs).shape_of(decoding, prefills)
    shapes = Shapes(config, tile_rows)
    held = shapes.holding(exact)
    assert all(room >= need for room, need in zip(held, exact, strict=True))
    assert held in shapes.captured or held == exact._replace(blocks=shapes.blocks)
    assert all(room >= need for room, need in zip(shapes.largest, held, strict=True))
