"""Every Triton kernel against its plain-PyTorch twin: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tensors

from engine.executor.batch import ForwardBatch, KVCache, Span, build_batch, query_tiles
from engine.executor.kernels import ops
from engine.executor.kernels.copy_blocks import copy_blocks
from engine.executor.kernels.paged_decode import cut, paged_decode
from engine.executor.kernels.paged_prefill import paged_prefill
from engine.executor.kernels.skinny_linear import skinny_linear
from engine.executor.kernels.tuning import Skinny, Tiles
from engine.executor.model import Llama
from engine.executor.reference import ops as reference
from engine.executor.weights import dummy_weights
from engine.model.config import ModelConfig

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PADDING = 2**31 - 1  # in a block table; no such block exists
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)
HEADS = [(4, 4), (4, 2), (3, 1), (8, 2), (5, 1), (12, 2), (7, 1), (8, 1)]  # queries, KV: groups of 1 to 8
HEAD_DIMS = [64, 80, 96, 128, 256]


def distance(out: torch.Tensor, expected: torch.Tensor) -> float:
    """‖out - expected‖ / ‖expected‖ in float64; NaN if there is one."""
    out, expected = out.cpu().double(), expected.cpu().double()
    return float((out - expected).norm() / expected.norm())


def paged(contexts: Sequence[int], rows: Sequence[int], block_size: int) -> ForwardBatch:
    """A batch whose requests own shuffled blocks; decodes, if all have one row."""
    blocks = [-(-context // block_size) for context in contexts]
    ids = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1)).split(blocks)
    parts = zip(contexts, rows, ids, strict=True)
    requests = [([0] * m, n - m, owned.tolist()) for n, m, owned in parts]
    batch = build_batch(requests, len(rows) if set(rows) == {1} else 0, block_size)
    for table, used in zip(batch.block_tables, blocks, strict=True):
        table[used:] = PADDING
    return batch


def contexts_of(batch: ForwardBatch) -> list[int]:
    return [*batch.context_lens.tolist(), *(span.context for span in batch.prefills)]


def oracle(q: torch.Tensor, kv: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
    """The reference's attention of a batch that has only decodes, or only others."""
    plan = reference.plan_decodes if batch.num_decodes else reference.plan_prefills
    out = torch.empty_like(q)
    reference.attention(out, q, kv, plan(batch, kv[None]))
    return out


def cache_of(batch: ForwardBatch, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    """A layer's cache: random where a request of the batch has a token, NaN elsewhere, in a block to spare too."""
    tables = batch.block_tables
    num_blocks = int(tables[tables != PADDING].max()) + 2
    kv = torch.full((2, num_blocks, block_size, kv_heads, head_dim), torch.nan)
    for table, context in zip(tables, contexts_of(batch), strict=True):
        token = torch.arange(context)
        slots = table[token // block_size].long() * block_size + token % block_size
        kv.view(2, -1, kv_heads, head_dim)[:, slots] = torch.randn(2, context, kv_heads, head_dim)
    return kv.to(dtype)


def attend(
    contexts: Sequence[int],
    rows: Sequence[int],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
) -> float:
    """The distance between the two attentions, on random numbers; queries are a slice of a wider tensor."""
    torch.manual_seed(0)
    batch = paged(contexts, rows, block_size)
    kv = cache_of(batch, heads[1], head_dim, block_size, dtype)
    q = torch.randn(sum(rows), heads[0] + 2, head_dim).to(dtype)[:, : heads[0]]
    expected = oracle(q.double(), kv.double(), batch)
    caches = kv[None].to(DEVICE)
    batch = move(batch, ops.tile_rows(caches))
    plan = ops.plan_decodes(batch, caches) if batch.num_decodes else ops.plan_prefills(batch, caches)
    out = torch.full(q.shape, torch.nan, dtype=dtype, device=DEVICE)
    ops.attention(out, q.to(DEVICE), caches[0], plan)
    return distance(out, expected)


def move(batch: ForwardBatch, tile_rows: int) -> ForwardBatch:
    """The same batch on the device, with the tiles that the kernels want."""
    fields = {name: getattr(batch, name) for name in ForwardBatch.__slots__}
    fields["tiles"] = torch.from_numpy(query_tiles(batch.prefills, batch.num_decodes, tile_rows))
    tensors = {name: value.to(DEVICE) for name, value in fields.items() if isinstance(value, torch.Tensor)}
    return ForwardBatch(**(fields | tensors))


# The interpreter has no bf16 of its own, and multiplies matrices of it wrongly.
DOT_DTYPES = DTYPES if ON_GPU else [torch.float32, torch.float16]
CASES = [
    *[(heads, 64, 16, torch.float16) for heads in HEADS],
    *[((3, 1), head_dim, 16, dtype) for head_dim in HEAD_DIMS for dtype in DOT_DTYPES],
    *[((2, 1), 64, block_size, torch.float32) for block_size in (32, 64)],
]


@pytest.mark.parametrize(("heads", "head_dim", "block_size", "dtype"), CASES)
def test_prefill_attends_like_its_oracle(heads, head_dim, block_size, dtype):
    assert attend([70, 3, 130], [70, 3, 40], heads, head_dim, block_size, dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize(("heads", "head_dim", "block_size", "dtype"), CASES)
def test_decode_attends_like_its_oracle(heads, head_dim, block_size, dtype):
    assert attend([1, 700, 33, 64], [1] * 4, heads, head_dim, block_size, dtype) < TOLERANCE[dtype]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 150), st.integers(1, 150)), min_size=1, max_size=4), st.sampled_from([16, 32]))
def test_a_chunk_of_any_length_attends_to_any_earlier_context(chunks, block_size):
    rows = [m for _, m in chunks]
    contexts = [earlier + m for earlier, m in chunks]
    assert attend([*contexts, 2], [*rows, 2], (2, 1), 64, block_size, torch.float32) < TOLERANCE[torch.float32]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 1500), min_size=1, max_size=5), st.sampled_from([16, 64]))
def test_decode_attends_to_contexts_of_any_length(contexts, block_size):
    assert attend(contexts, [1] * len(contexts), (3, 1), 64, block_size, torch.float32) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_blocks_fetched_in_bulk_change_nothing(head_dim):
    batch = paged([70, 200, 131, 300], [70, 3, 130, 200], 64)
    kv = cache_of(batch, 1, head_dim, 64, torch.float16)
    q = torch.randn(403, 2, head_dim).half()
    tiles = Tiles(rows=64, tokens=64 if head_dim < 256 else 32, warps=4, stages=2, bulk=True)
    out = torch.full_like(q, torch.nan, device=DEVICE)
    moved = move(batch, tiles.rows)
    paged_prefill(out, q.to(DEVICE), kv.to(DEVICE), moved.tiles, moved.block_tables, tiles)
    assert distance(out, oracle(q.double(), kv.double(), batch)) < TOLERANCE[torch.float16]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=300), st.sampled_from([1, 4, 20, 600]))
def test_pieces_cover_every_request_once_and_fit(contexts, programs):
    lengths = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    table = cut(lengths, kv_heads=2, programs=programs, chunk=128).pieces.tolist()
    work = [tuple(piece) for piece in table if piece[2] > 0]
    counts = {request: count for request, _, count, _ in work}
    assert sorted(counts) == list(range(len(contexts)))
    assert work == [(i, part, counts[i], contexts[i]) for i in counts for part in range(counts[i])]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=300))
def test_long_pieces_come_first(contexts):
    table = cut(torch.tensor(contexts, dtype=torch.int32, device=DEVICE), 2, programs=20, chunk=128).pieces.tolist()
    sizes = [-(-context // count) for _, _, count, context in table if count > 0]
    assert sizes == sorted(sizes, reverse=True)


def test_requests_are_split_only_while_there_are_too_few_to_fill_the_gpu():
    def pieces(contexts):
        table = cut(torch.tensor(contexts, dtype=torch.int32, device=DEVICE), 8, programs=256, chunk=256).pieces
        return [sum(1 for piece in table.tolist() if piece[2] and piece[0] == i) for i in range(len(contexts))]

    assert pieces([200]) == [1]
    assert pieces([16384]) == [32]
    assert pieces([1024] * 32) == [1] * 32
    assert pieces([16384] + [100] * 31) == [22] + [1] * 31


def test_a_request_without_tokens_pads_a_decode_batch_and_is_given_zeros():
    batch = paged([40, 600], [1, 1], 16)
    kv = cache_of(batch, 1, 64, 16, torch.float32).to(DEVICE)
    q = torch.randn(2, 3, 64, device=DEVICE)
    out = torch.full_like(q, torch.nan)
    pieces = cut(torch.tensor([40, 0], dtype=torch.int32, device=DEVICE), 1, programs=4, chunk=64)
    paged_decode(out, q, kv, batch.block_tables.to(DEVICE), pieces, Tiles(16, 64, 4, 2))
    assert out[0].isfinite().all()
    assert torch.equal(out[1], torch.zeros_like(out[1]))


def test_a_plan_serves_layer_after_layer():
    batch = paged([900, 20], [1, 1], 16)
    pieces = cut(batch.context_lens.to(DEVICE), 1, programs=8, chunk=64)
    tables = batch.block_tables.to(DEVICE)
    for _ in range(2):
        kv = cache_of(batch, 1, 64, 16, torch.float32)
        q = torch.randn(2, 3, 64)
        out = torch.full((2, 3, 64), torch.nan, device=DEVICE)
        paged_decode(out, q.to(DEVICE), kv.to(DEVICE), tables, pieces, Tiles(16, 32, 4, 2))
        assert distance(out, oracle(q, kv, batch)) < 2e-6


def test_query_tiles_are_a_flat_list_with_the_longest_context_first():
    tiles = query_tiles([Span(0, 5, 5), Span(5, 1, 1), Span(6, 3, 103)], first=4, rows=2)
    assert tiles.tolist() == [
        [6, 8, 9, 102],
        [6, 6, 9, 100],
        [4, 4, 5, 4],
        [4, 2, 5, 2],
        [4, 0, 5, 0],
        [5, 5, 6, 0],
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((5, 1), 64), ((7, 1), 80), ((6, 2), 96), ((8, 8), 128), ((3, 1), 256)]
)
def test_rope_and_cache_turns_and_writes_like_its_oracle(heads, head_dim, dtype):
    torch.manual_seed(0)
    queries, kv_heads = heads
    positions, slots = torch.tensor([0, 7, 130_000, 3, 11]), torch.tensor([35, 2, 70, 0, 41])
    inv_freq = 500_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    qkv = torch.randn(5, queries + 2 * kv_heads, head_dim).to(dtype)
    kv = torch.full((2, 5, 16, kv_heads, head_dim), torch.nan, dtype=dtype)
    ours = kv.to(DEVICE)
    out = ops.rope_and_cache(
        qkv.to(DEVICE, copy=True), ops.rotation(positions.to(DEVICE), inv_freq.to(DEVICE)), slots.to(DEVICE), ours
    )
    wide = qkv.double() if dtype == torch.float32 else qkv.float()
    expected_kv = kv.to(wide.dtype)
    expected = reference.rope_and_cache(wide, reference.rotation(positions, inv_freq), slots, expected_kv)
    assert distance(out, expected) < TOLERANCE[dtype]
    assert torch.equal(ours.isnan().cpu(), expected_kv.isnan())
    assert distance(ours.nan_to_num(), expected_kv.nan_to_num()) < TOLERANCE[dtype]


def test_a_negative_slot_is_not_written():
    kv = torch.full((2, 3, 16, 1, 64), torch.nan, device=DEVICE)
    turn = ops.rotation(torch.tensor([4], device=DEVICE), torch.ones(32, device=DEVICE))
    ops.rope_and_cache(torch.randn(1, 3, 64, device=DEVICE), turn, torch.tensor([-1], device=DEVICE), kv)
    assert kv.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [66, 1024, 5120])
def test_add_rms_norm_adds_and_norms_like_its_oracle(width, dtype):
    torch.manual_seed(0)
    hidden, update = torch.randn(2, 3, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    stream = hidden.to(DEVICE, copy=True)
    out = ops.add_rms_norm(stream, update.to(DEVICE), weight.to(DEVICE), 1e-5)
    assert distance(stream, hidden + update) < TOLERANCE[dtype]
    expected = reference.add_rms_norm((hidden + update).double(), torch.zeros(1), weight.double(), 1e-5)
    assert distance(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [7, 91, 1536])
def test_silu_and_mul_is_its_oracle(inner, dtype):
    gate_up = (4 * torch.randn(3, 2 * inner, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert distance(ops.silu_and_mul(gate_up.to(DEVICE)), reference.silu_and_mul(gate_up.double())) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5, 101, 20_000])
def test_greedy_takes_the_first_of_the_largest(vocab, dtype):
    logits = torch.randint(-50, 50, (4, vocab), generator=torch.Generator().manual_seed(vocab)).to(dtype) / 8
    logits[1] = -torch.inf
    expected = torch.tensor([row.index(max(row)) for row in logits.tolist()])
    assert torch.equal(ops.greedy(logits.to(DEVICE)).cpu(), expected)


@pytest.mark.parametrize("op", [ops.greedy, reference.greedy], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 4095, 4096, 9999])
def test_a_row_with_a_nan_has_no_token_and_its_neighbours_have_theirs(at, dtype, op):
    logits = torch.randn(4, 10_000, generator=torch.Generator().manual_seed(at)).to(dtype).to(DEVICE)
    expected = op(logits)
    logits[1, at] = torch.nan
    logits[3] = torch.nan
    expected[[1, 3]] = -1
    assert torch.equal(op(logits), expected)


def test_copy_blocks_moves_blocks_of_all_layers_to_another_cache_and_back():
    gpu = torch.randn(3, 2, 7, 16, 2, 80, device=DEVICE, dtype=torch.float16)
    before, host = gpu.clone(), torch.full((3, 2, 4, 16, 2, 80), torch.nan, dtype=torch.float16, pin_memory=ON_GPU)
    copy_blocks(gpu, host, torch.tensor([[5, 0], [1, 3]], device=DEVICE))
    torch.cuda.synchronize() if ON_GPU else None
    assert torch.equal(host[:, :, [0, 3]], before[:, :, [5, 1]].cpu())
    assert host[:, :, [1, 2]].isnan().all()
    copy_blocks(host, gpu, torch.tensor([[3, 2]], device=DEVICE))
    assert torch.equal(gpu[:, :, 2], before[:, :, 1])
    assert torch.equal(gpu[:, :, [0, 1, 3, 4, 5, 6]], before[:, :, [0, 1, 3, 4, 5, 6]])


TINY = ModelConfig(
    name="tiny",
    vocab_size=101,
    hidden_size=66,
    intermediate_size=91,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=80,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
    attention_bias=True,
    mlp_bias=True,
    eos_token_ids=(2,),
)


STEPS = [  # (text, from, to) of each request, and how many of them decode
    ([(0, 0, 50), (1, 0, 89), (2, 0, 30)], 0),
    ([(1, 89, 90), (2, 30, 31), (0, 50, 80)], 2),
    ([(0, 80, 81), (2, 31, 32)], 2),
]


def logits_of_steps(data_plane: ModuleType) -> torch.Tensor:
    """The logits of whole prompts, a later chunk and decodes, on random weights wide enough for uneven attention."""
    weights = dummy_weights(TINY, torch.float32, DEVICE)
    for tensor in tensors(weights):
        tensor.mul_(500)
    llama = Llama(TINY, weights, data_plane)
    cache = KVCache.allocate(TINY, num_blocks=10, block_size=32, dtype=torch.float32, device=DEVICE)
    cache.data.fill_(torch.nan)
    texts = torch.randint(101, (3, 90), generator=torch.Generator().manual_seed(0)).tolist()
    blocks = [[6, 0, 3], [1, 8, 2], [5, 4, 7]]
    logits = []
    for requests, decodes in STEPS:
        rows = [(texts[text][begin:end], begin, blocks[text]) for text, begin, end in requests]
        logits.append(llama.logits(llama.batch(rows, decodes, cache), cache))
    return torch.cat(logits)


def test_a_model_on_the_kernels_gives_the_logits_of_the_reference():
    assert distance(logits_of_steps(ops), logits_of_steps(reference)) < 1e-5


gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: the interpreter neither compiles nor captures")


@gpu_only
def test_a_captured_decode_follows_contexts_that_grow():
    batch = move(paged([2000, 1500], [1, 1], 16), tile_rows=64)
    kv = cache_of(paged([2000, 1500], [1, 1], 16), 1, 64, 16, torch.float32).to(DEVICE)
    lengths = torch.tensor([1, 1], dtype=torch.int32, device=DEVICE)
    q = torch.randn(2, 3, 64, device=DEVICE)
    out = torch.empty_like(q)

    def step() -> None:
        pieces = cut(lengths, kv_heads=1, programs=16, chunk=64)
        paged_decode(out, q, kv, batch.block_tables, pieces, Tiles(16, 32, 4, 2))

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for contexts in ([5, 1500], [2000, 64], [1, 1]):
        lengths.copy_(torch.tensor(contexts))
        graph.replay()
        batch.context_lens = lengths
        assert distance(out, oracle(q, kv, batch)) < TOLERANCE[torch.float32]


@gpu_only
def test_no_length_or_batch_size_makes_a_kernel_compile_again(monkeypatch):
    def run(contexts: list[int]) -> None:
        for rows in ([1] * len(contexts), [*[min(n, 40) for n in contexts[:-1]], min(2, contexts[-1])]):
            attend(contexts, rows, (2, 1), 64, 16, torch.float16)

    run([20])
    compiled: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **details: compiled.append(details["repr"])
    )
    for contexts in ([2], [100, 1], [33, 512, 16], [1000] * 17):
        run(contexts)
    assert compiled == []


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize(("columns", "depth"), [(64, 64), (101, 192), (7, 128)])
def test_a_product_of_few_rows_is_that_of_many(rows, columns, depth):
    x, weight = torch.randn(rows, depth).half(), torch.randn(columns, depth).half()
    out = skinny_linear(x.to(DEVICE), weight.to(DEVICE), Skinny(16, 32, 64, 4, 3))
    assert distance(out, reference.linear(x.double(), weight.double(), None)) < TOLERANCE[torch.float16]


@pytest.mark.skipif(DEVICE == "cpu", reason="cuBLAS multiplies where no GPU's table says otherwise")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [1024, 4096, 6144, 28672, 28700])
def test_every_product_of_few_rows_that_the_table_knows(columns, dtype):
    for rows in (1, 2, 15, 16, 17, 32, 33, 63, 64, 65):
        x, weight = (torch.randn(each, 512, dtype=dtype, device=DEVICE) for each in (rows, columns))
        expected = reference.linear(x.double(), weight.double(), None)
        assert distance(ops.linear(x, weight, None), expected.cpu()) < TOLERANCE[dtype]
